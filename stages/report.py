"""All records, outputs/champion/champion.json -> outputs/report: the table, the plots and the page of the present grid."""

from pipeline import report
from pipeline.champion import decided
from pipeline.lineage import present
from stages import OUTPUTS, folder, run


def main() -> None:
    """Report on the variants that params.yaml names; folders of others are left out."""
    champion = decided(OUTPUTS)
    made = report.write(present(OUTPUTS), folder("report"), champion)
    print(report.format_table(made), f"\n{folder('report') / 'index.html'}", sep="\n")


if __name__ == "__main__":
    run(main)
