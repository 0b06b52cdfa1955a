"""The registry of MLflow: one registered model, of it a version for each variant and precision, and the alias "champion".

A version is made once a variant's run is finished, and only where that run has none: publishing again adds nothing, and what an
interruption left out is added the next time. A variant that was built anew has a new run, hence a new version; the old one stays
with the tag current = "false". Versions without the tag `fingerprint` were made by others and are left alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.lineage import Chain

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

ALIAS = "champion"
ABOUT = "A version for each variant of a network and each precision it was exported in; current = true: of the present grid."


@dataclass(frozen=True)
class Entry:
    """A published variant: its run, the fingerprint of what was published, and the sum of the registered file."""

    chain: Chain
    run_id: str
    fingerprint: str
    sha256: str


def model_name(experiment: str) -> str:
    """The registered model of an experiment: its name, "-" for what MLflow allows in no model's name."""
    return re.sub(r"[/:'\"]", "-", experiment)


def register(client: Any, experiment_id: str, name: str, entries: Sequence[Entry], decision: dict[str, Any]) -> str | None:
    """Bring the registered model `name` up to date: a version for each of `entries`, and the alias where `decision` (as
    champion.json holds it) says. Returns the version that bears the alias, None where no variant was chosen.

    Raises `InputError` where the chosen variant is not among `entries`.
    """
    chosen = decision["champion"]
    if chosen is not None and chosen not in {entry.chain.name for entry in entries}:
        raise InputError(f"the champion {chosen} is not of the present grid: run `dvc repro`")
    model = _model(client, name)
    known = versions(client, name)
    made = {str(version.run_id): version for version in known if "fingerprint" in version.tags}
    current = {entry.chain.name: made.get(entry.run_id) or _create(client, experiment_id, name, entry) for entry in entries}
    wanted = {str(version.version) for version in current.values()}
    for version in made.values():
        _tag(client, version, "current", "true" if str(version.version) in wanted else "false")
    bearer = None if chosen is None else current[chosen]
    _choose(client, model, bearer, known, decision)
    return None if bearer is None else str(bearer.version)


def versions(client: Any, name: str) -> list["ModelVersion"]:
    """All versions of a registered model."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _model(client: Any, name: str) -> "RegisteredModel":
    """The registered model, made where it is missing."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
    return client.create_registered_model(name, description=ABOUT)


def _create(client: Any, experiment_id: str, name: str, entry: Entry) -> "ModelVersion":
    """A version of the model that a variant's run has logged, with its tags from the first."""
    logged = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{entry.run_id}'")
    if not logged:
        raise InputError(
            f"the run {entry.run_id} of {entry.chain.name} in MLflow has lost its model: delete the run, `make track` again"
        )
    chain, last = entry.chain, list(entry.chain.records.values())[-1]
    tags = {"variant": f"{chain.revive}-{chain.compress}-{chain.seed}", "precision": chain.precision, "seed": str(chain.seed)}
    tags |= {"revive": chain.revive, "compress": chain.compress, "current": "true"}
    tags |= {"fingerprint": entry.fingerprint, "commit": str(last["commit"]), "data": str(last["data"]), "sha256": entry.sha256}
    source = f"models:/{logged[0].model_id}"
    return client.create_model_version(name, source, entry.run_id, tags, description=describe(chain), model_id=logged[0].model_id)


def describe(chain: Chain) -> str:
    """A variant in two sentences, with its main figures."""
    names = chain.names
    parts = []
    for stage, key, text in (
        ("export", f"test_{names.headline}", f"test {names.title} {{:.2%}}"),
        ("profile", "size_mb", "{:.3g} MB"),
        ("profile", "macs", "{:,.0f} multiply-adds"),
        ("profile", "latency_cpu_b1_p50_ms", "{:.3g} ms for one image on the CPU (median)"),
    ):
        value = chain.metric(stage, key)
        parts += [] if value is None else [text.format(value)]
    return (
        f"{chain.revive}, then {chain.compress}, seed {chain.seed}, in {chain.precision}: {', '.join(parts) or 'not measured'}. "
        "Takes pictures, uint8 (N, H, W, C); MODEL_CARD.md in its run tells the rest."
    )


def _choose(
    client: Any, model: "RegisteredModel", chosen: "ModelVersion | None", known: list["ModelVersion"], decision: dict[str, Any]
) -> None:
    """Move the alias to `chosen`, or take it away, and write the reason beside it."""
    for version in known:
        if ALIAS in version.tags and (chosen is None or str(version.version) != str(chosen.version)):
            client.delete_model_version_tag(model.name, version.version, ALIAS)
    bearer = model.aliases.get(ALIAS)
    if chosen is not None:
        _tag(client, chosen, ALIAS, decision["reason"])
        if str(bearer) != str(chosen.version):
            client.set_registered_model_alias(model.name, ALIAS, str(chosen.version))
    elif bearer is not None:
        client.delete_registered_model_alias(model.name, ALIAS)
    told = f"{decision['champion'] or 'none'}: {decision['reason']}"
    if model.tags.get(ALIAS) != told:
        client.set_registered_model_tag(model.name, ALIAS, told)


def _tag(client: Any, version: "ModelVersion", key: str, value: str) -> None:
    if version.tags.get(key) != value:
        client.set_model_version_tag(version.name, version.version, key, value)
