"""outputs/*/*/record.json -> outputs/report: the table, the plots and the page of the present grid."""

from pipeline import report
from pipeline.config import Variants, read_params, section
from pipeline.lineage import select
from pipeline.records import read_records
from stages import OUTPUTS, folder, run


def main() -> None:
    """Report on the variants that params.yaml names; folders of others are left out."""
    grid = section("variants", Variants)
    records = select(read_records(OUTPUTS), grid.revive, grid.compress, read_params()["seed"])
    made = report.write(records, folder("report"))
    print(report.format_table(made), f"\n{folder('report') / 'index.html'}", sep="\n")


if __name__ == "__main__":
    run(main)
