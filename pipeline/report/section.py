"""A variant's part of the page: what each stage changed, what happened in it, its proofs, charts and parameters."""

from collections.abc import Iterable
from html import escape
from urllib.parse import quote

from pipeline.lineage import Chain, flat_parameters
from pipeline.report import edits, heat, predictions, sensitive, story, strength, widths
from pipeline.report.edits import Treated
from pipeline.report.strength import Stretch
from pipeline.report.table import write_figure

MOST_ROWS = 400  # of a table with a row for each layer of each event; beyond them a row a layer
KEY = (
    ('<rect width="24" height="14" fill="currentColor" fill-opacity=".15"/>', "all filters, weakest to strongest"),
    ('<rect width="24" height="14" fill="currentColor" fill-opacity=".32"/>', "nine in ten of them"),
    ('<rect width="24" height="14" fill="currentColor" fill-opacity=".56"/>', "the middle half"),
    ('<path class="line" stroke="currentColor" d="M0 7H24"/>', "the median filter"),
    ('<path class="dead" d="M0 7H24"/>', f"norm {strength.DEAD:g}: a filter below it counts as dead"),
    ('<path class="event" d="M7 2H17L12 11z"/>', "an event: a method changed the network after this epoch"),
)
MOVE = (
    '<g class="move"><path d="M12 14V6"/><path d="M12 0l-4 7h8z"/></g>',
    "mean norm of the filters an event touched, before and after",
)


def render(chain: Chain, control: Chain | None = None, shipped: str = "", mistakes: str = "") -> str:
    """The section below a variant's name, as HTML; `control` is the chain beside whose pictures this one's stand. `shipped` follows
    what happened, `mistakes` the pictures."""
    parts = [_stages(chain)]
    for stage, record in chain.records.items():
        told = "".join(f"<li>{_foldable(line, lines)}</li>" for line, lines in story.happenings(record))
        parts.append(f"<h4>{escape(stage)}</h4><ul class=told>{told}</ul>" if told else "")
    parts += [shipped, predictions.render(chain, control), mistakes, _curves(chain), _filters(chain)]
    parts += [_layers(found, chain) for record in chain.records.values() for found in edits.treated(record)]
    parts += [*map(sensitive.section, chain.records.values()), narrowed := widths.section(chain)]
    layers = None if narrowed else story.channels(chain)
    parts.append(f"<h4>channels, kept of full</h4><figure class=bars>{layers}</figure>" if layers else "")
    flat = "\n".join(f"{key}: {value}" for key, value in flat_parameters(chain.records).items())
    parts.append(f"<details><summary>parameters</summary><pre tabindex=0>{escape(flat)}</pre></details>")
    return "".join(parts)


def bullets(lines: Iterable[str], kind: str) -> str:
    """A list, or nothing where there are no lines."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class={kind}>{items}</ul>" if items else ""


def _foldable(line: str, lines: Iterable[str]) -> str:
    inside = bullets(lines, "told")
    return f"<details><summary>{escape(line)}</summary>{inside}</details>" if inside else escape(line)


def _curves(chain: Chain) -> str:
    drawn = [svg for svg in (story.curves(chain, "accuracy"), story.curves(chain, "loss")) if svg]
    key = "Solid: validation; dashed: training. Triangles: a method changed the network."
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    return f"<h4>training</h4><div class=pair>{figures}</div><p>{key}</p>" if drawn else ""


def _filters(chain: Chain) -> str:
    """The fan of filter norms, how to read it, and its ends as numbers."""
    drawn, parts = story.filters(chain), story.strengths(chain)
    if not drawn:
        return ""
    key = "".join(
        f'<li><svg viewBox="0 0 24 14" aria-hidden="true">{sign}</svg>{escape(text)}</li>'
        for sign, text in (*KEY, *([MOVE] if story.moves(chain) else []))
    )
    edge = f" ~0: on the lower edge are norms of {strength.FLOOR:g} or less, 0 itself too." if strength.clipped(parts) else ""
    told = f"A filter's norm is the sum of its absolute weights, here after each epoch, before that epoch's event.{edge}"
    side = f"<p>{told}</p><ul class=key>{key}</ul>{_ends(parts)}"
    return f"<h4>filter norms</h4><div class=pair><figure>{drawn}</figure><div class=side>{side}</div></div>"


def _ends(parts: Iterable[Stretch]) -> str:
    lines = []
    for part in parts:
        most = max(part.dead)
        epoch = part.epochs[part.dead.index(most)]
        cells = [f"{part.norms[p][-1]:.3g}" for p in (0, 50)] + [f"{100 * part.dead[-1]:.3g} %"]
        cells.append(f"{100 * most:.3g} %, epoch {epoch:g}" if most else "none")
        lines.append(f"<tr><th scope=row>{escape(part.stage)}</th>{''.join(f'<td>{text}</td>' for text in cells)}</tr>")
    titles = ("end of", "weakest", "median", "dead", "most dead")
    return _table(titles, lines)


def _layers(found: Treated, chain: Chain) -> str:
    """The map of what events did to each layer, and its numbers."""
    title = f"{found.stage}, {found.kind}: layer by layer"
    if not found.cells:
        return f"<p>{escape(title)}: no layer was touched.</p>"
    figure = f"<div class='wide heat'><figure>{heat.layers(found)}</figure></div>"
    count = sum(len(edits.by_layer([event])) for event in found.events)
    numbers = _each(found) if count <= MOST_ROWS else _in_sum(found)
    path = f"{found.stage}/{chain.records[found.stage]['variant']}/record.json"
    link = f'<p class=quiet>In full: <a href="../{escape(quote(path))}"><code>outputs/{escape(path)}</code></a></p>'
    inside = f"{figure}<details><summary>the numbers</summary>{numbers}{link}</details>"
    return f"<details class=touched open><summary><b>{escape(title)}</b></summary>{inside}</details>"


def _each(found: Treated) -> str:
    """A row for each layer of each event."""
    groups = [(edits.when([e]), name, rows) for e in found.events for name, rows in edits.by_layer([e]).items()]
    return _numbers(found, ("event", "layer"), groups)


def _in_sum(found: Treated) -> str:
    """A row for each layer: all events together."""
    rows = edits.by_layer(found.events)
    groups = [(name, f"{len(rows[name]):,} of {len(found.events):,}", rows[name]) for name in found.layers if name in rows]
    return _numbers(found, ("layer", "events"), groups)


def _numbers(found: Treated, heads: tuple[str, str], groups: list[tuple[str, str, list[edits.Row]]]) -> str:
    counted = [edits.counts(rows, found.sizes.get(name if heads[1] == "layer" else first, {})) for first, name, rows in groups]
    keys = list(dict.fromkeys(key for numbers in counted for key in numbers))
    lines = []
    for (first, second, rows), numbers in zip(groups, counted, strict=True):
        before, after = edits.norms(rows) or (None, None)
        cells = [second, *(numbers.get(key, "") for key in keys)]
        cells += ["" if value is None else f"{value:.4g}" for value in (before, after)]
        cells += [f"× {after / before:.3g}" if before and after is not None else ""]
        lines.append(f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>")
    return _table((*heads, *keys, f"mean norm of {found.norm_of} before", "after", "change"), lines, "stages")


def _stages(chain: Chain) -> str:
    lines, names = [], chain.names
    for stage, record in chain.records.items():
        metrics, kept = record["metrics"], story.total_channels(record)
        proof = ""
        if "max_abs_difference" in metrics:
            agree = _figure(metrics, names.agreement, "percent")
            proof = f"largest difference {metrics['max_abs_difference']:.1e}, {names.agree} {agree}"
        cells = [
            story.method(record),
            _figure(metrics, f"test_{names.headline}", "percent"),
            _figure(metrics, "parameters", "count"),
        ]
        cells += [f"{kept[0]} of {kept[1]}" if kept else "", proof, f"{record['seconds']:.1f} s"]
        lines.append(f"<tr><th scope=row>{escape(stage)}</th>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>")
    return _table(("stage", "method", f"test {names.title}", "parameters", "channels", "certificate", "time"), lines, "stages")


def _table(titles: Iterable[str], lines: Iterable[str], kind: str = "numbers") -> str:
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    return f"<div class=wide><table class={kind}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _figure(metrics: dict[str, float], key: str, form: str) -> str:
    return write_figure(metrics[key], form) if key in metrics else ""
