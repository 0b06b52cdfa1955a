"""Pictures of what a variant answers to some test images, from the record of its export: for the page, as inline PNG."""

from html import escape
from typing import Any

from pipeline.lineage import Chain

MASK_KEY = "White: foreground found. Orange: found where there is none. Blue: there and not found."
DEPTH_KEY = "Yellow is near ({:g} m), violet far ({:g} m); black: unknown, or not above 0."


def render(chain: Chain, control: Chain | None) -> str:
    """Images of the test split with what is true and what the variant says; of masks and depths also what `control` says. Nothing
    where no record holds any."""
    found = _event(chain)
    if found is None:
        return ""
    inside = _classes(found) if found["task"] == "classify" else _rows(found, chain, control)
    return f"<h4>predictions on test images</h4>{inside}"


def _event(chain: Chain) -> dict[str, Any] | None:
    events = chain.records.get("export", {}).get("events", [])
    return next((event for event in events if event["kind"] == "predictions"), None)


def _classes(found: dict[str, Any]) -> str:
    """Images from all over the split, then mistakes."""
    spread, wrong = ([one for one in found["shown"] if one[why]] for why in ("spread", "mistake"))
    told = f"{len(spread)} from all over the test split; a mistake is framed, the true class in brackets."
    parts = [f"<p>{told}</p>", _grid(spread)]
    if wrong:
        all_of = "all" if len(wrong) == found["mistakes"] else f"the first {len(wrong)}"
        images, errors = f"{found['images']:,}", f"{found['mistakes']:,}"
        parts += [f"<p>Its mistakes, {all_of} of {errors} on {images} test images:</p>", _grid(wrong)]
    else:
        parts.append(f"<p>No mistake on {found['images']:,} test images.</p>")
    return "".join(parts)


def _grid(shown: list[dict[str, Any]]) -> str:
    items = []
    for one in shown:
        said = one["answer"] if one["right"] else f"{one['answer']} ({one['target']})"
        mark = "" if one["right"] else " class=wrong"
        items.append(f"<li{mark}>{_picture(one['image'], 'test image', one)}{escape(str(said))}</li>")
    return f"<ul class=pictures>{''.join(items)}</ul>"


def _rows(found: dict[str, Any], chain: Chain, control: Chain | None) -> str:
    """A row each: images, what is true, what the control says, what the variant says."""
    numbers = [one["number"] for one in found["shown"]]
    rows = [("image", "image", found, False), ("true", "target", found, False)]
    beside = _event(control) if control and control.name != chain.name else None
    if control and beside and [one["number"] for one in beside["shown"]] == numbers:
        rows.append((f"control, {control.name}", "answer", beside, True))
    rows.append((f"this variant, {chain.name}" if len(rows) > 2 else chain.name, "answer", found, True))
    lines = []
    for title, key, event, scored in rows:
        cells = []
        for one in event["shown"]:
            score = f"<small>{chain.names.title} {100 * one['score']:.1f} %</small>" if scored else ""
            cells.append(f"<td>{_picture(one[key], f'{title}, test image', one)}{score}</td>")
        lines.append(f"<tr><th scope=row>{escape(title)}</th>{''.join(cells)}</tr>")
    legend = MASK_KEY if found["task"] == "segment" else DEPTH_KEY.format(*found["range_m"])
    told = f"{len(numbers)} from all over the {found['images']:,} test images. {legend}"
    return f"<p>{escape(told)}</p><div class=wide><table class=rows><tbody>{''.join(lines)}</tbody></table></div>"


def _picture(content: str, told: str, one: dict[str, Any]) -> str:
    return f'<img src="data:image/png;base64,{escape(content)}" alt="{escape(told)} {one["number"]:d}">'
