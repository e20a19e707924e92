# SPDX-License-Identifier: MIT
"""
Look at rewards: every token of explanations and solutions, as a page for a browser and as a picture.

    a finished run            python figures/inspect_reward.py runs/teacher
    distilled rows            python figures/inspect_reward.py runs/distilled.jsonl
    any rows, scored now      python figures/inspect_reward.py rows.jsonl --model runs/teacher --student toy

Explanations of a question stand side by side, highest reward first. A token of an explanation is shaded by its KL, a
token of the solution by minus its log-prob; the hardest leap (highest KL, ▲) and the least understood token of the
solution (lowest log-prob, ▼) are marked. The page is one file that needs no network; the picture shows its first
question. With --model the rows are scored first, by distill.py --score-file, all of whose flags can be given here.
"""

import html
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags
from rlt.errors import UserError
from rlt.files import write_atomically
from rlt.inspection import ROWS

from reward_rows import LEVELS, equations, level, number, read_scored, visible

ROOT = Path(__file__).resolve().parent.parent

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-bottom: .3rem; }
h3, h4 { font-size: 1rem; margin: 0; } h4 { font-size: .85rem; }
.group { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
article { border: 1px solid #767676; border-radius: 4px; padding: .7rem; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; margin: .2rem 0 .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; font-size: .85rem; }
td, th { padding: 0 .5rem 0 0; text-align: left; font-weight: normal; vertical-align: top; } td.v { text-align: right; }
tr:last-child > * { font-weight: bold; }
.note { font-size: .85rem; margin: 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-bottom: 0 solid #111; padding-bottom: 1px; margin-right: 1px; } .note .t { white-space: nowrap; }
.t:focus { outline: 3px solid #005fcc; outline-offset: 1px; }
.l1 { border-bottom-width: 1px; } .l2 { border-bottom-width: 2px; } .l3 { border-bottom-width: 4px; }
.l4 { border-bottom-width: 6px; }
.kl .l1 { background: #fff0dc; } .kl .l2 { background: #ffd9a8; } .kl .l3 { background: #fdb462; }
.kl .l4 { background: #f58f29; }
.lp .l1 { background: #e6f0fa; } .lp .l2 { background: #c3dbf2; } .lp .l3 { background: #93bfe8; }
.lp .l4 { background: #69a5de; }
.mark { box-shadow: 0 0 0 2px #111; border-radius: 2px; margin: 0 4px 0 3px; }
#numbers:checked ~ main .t { display: inline-block; }
#numbers:checked ~ main .t::after { content: attr(data-v); font: .65em system-ui; vertical-align: sub; color: #333;
  padding: 0 .25em; }
#at { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #767676; padding: .3rem 0;
  min-height: 1.5em; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

SCRIPT = """
const at = document.getElementById("at");
function show(token) {
  const of = [...token.parentNode.querySelectorAll(".t")];
  const kind = token.parentNode.classList.contains("kl") ? at.dataset.kl : "log-prob";
  at.textContent = `token ${of.indexOf(token) + 1} of ${of.length} [${token.textContent}] ${kind} ${token.dataset.v}`;
}
document.addEventListener("focusin", e => { if (e.target.matches(".t")) show(e.target); });
document.addEventListener("mouseover", e => { if (e.target.matches(".t")) show(e.target); });
document.addEventListener("click", e => { if (e.target.matches(".t")) show(e.target); });
document.addEventListener("keydown", e => {
  if (!e.target.matches(".t") || e.ctrlKey || e.altKey || e.metaKey) return;
  const of = [...e.target.parentNode.querySelectorAll(".t")], i = of.indexOf(e.target);
  const next = {ArrowRight: of[i + 1], ArrowLeft: of[i - 1], Home: of[0], End: of.at(-1),
                m: of.find(token => token.matches(".mark"))}[e.key];
  if (!next) return;
  e.preventDefault();
  e.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""


def token_spans(kind, texts, values, marked, symbol):
    """A paragraph of tokens, each shaded and underlined by its level; one of them, at `marked`, has the symbol."""
    spans = []
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        shade = level(value if kind == "kl" else -value)
        shown = symbol * (i == marked) + visible(text)
        classes = f"t l{shade}" + " mark" * (i == marked)
        spans.append(f'<span class="{classes}" tabindex="{-1 if i else 0}" data-v="{number(value)}">'
                     + html.escape(shown.rstrip("\n")) + "</span>" + "\n" * shown.endswith("\n"))
    return f'<p class="text {kind}">{"".join(spans) or "(empty)"}</p>'


def card(rank, scored, settings):
    """One explanation."""
    row, rows = scored.row, []
    for name, value, parts in equations(scored, settings):
        rows.append(f'<tr><th scope="row">{name}</th><td class="v">{value}</td><td>= {parts}</td></tr>')
    facts = ["closed" if row["closed"] else "not closed", "leaks the solution" if row.get("leak") else "no leak"]
    notes = []
    if scored.hardest is not None:
        notes.append(f"▲ hardest leap: {settings.kl_name} {number(scored.kl_max)}, token {scored.hardest + 1} of "
                     f"{len(scored.thought)}")
    notes.append(f"▼ least understood: log-prob {number(scored.score_min)}, token {scored.least + 1} of "
                 f"{len(scored.solution)} of the solution")
    return "\n".join([
        f"<article><h3>{rank}. reward {number(scored.reward)}</h3>", f'<p class="note">{", ".join(facts)}</p>',
        f"<table>{''.join(rows)}</table>", f"<h4>explanation, by {settings.kl_name}</h4>",
        token_spans("kl", scored.thought, scored.token_kl, scored.hardest, "▲"), "<h4>solution, by log-prob</h4>",
        token_spans("lp", scored.solution, scored.logprobs, scored.least, "▼"),
        *(f'<p class="note">{note}</p>' for note in notes), "</article>"])


def legend(kind, name):
    """The five shades of a kind of token, with their limits in nats."""
    limits = [f"under {LEVELS[0]:g}", *(f"{low:g} to {high:g}" for low, high in zip(LEVELS, LEVELS[1:], strict=False)),
              f"{LEVELS[-1]:g} and more"]
    shades = " ".join(f'<span class="t l{i}">{text}</span>' for i, text in enumerate(limits))
    return f'<p class="note {kind}">{name}, nats: {shades}</p>'


KEPT = (" A run keeps three explanations of every tenth step: the first one of the step's first question, and those "
        "with this question's lowest and highest reward.")


def page(source, settings, groups):
    """The whole page as text: HTML with its style and script in it."""
    kl = settings.kl_name
    estimate = "" if settings.kl == "exact" else (
        " A log-ratio is an estimate of the KL from the one token that was sampled: it can be negative, and so can kl.")
    kept = KEPT if Path(source).is_dir() else ""
    source = html.escape(visible(str(source)))
    body = []
    for i, group in enumerate(groups, 1):
        row = group[0].row
        step = f" (step {row['step']})" if "step" in row else ""
        cards = "".join(card(rank, scored, settings) for rank, scored in enumerate(group, 1))
        body.append(f'<section><h2 id="q{i}">Question {i}{step}</h2>'
                    f"<pre>{html.escape(visible(row['question']).replace('↵', ''))}</pre>"
                    f'<div class="group">{cards}</div></section>')
    links = " ".join(f'<a href="#q{i}">{i}</a>' for i in range(1, len(groups) + 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rewards of {source}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Rewards of {source}</h1>
<p class="note">reward = score − {settings.lam:g} × kl. score: log-prob of the solution's tokens, by the student that
has read the explanation. kl: {kl} of the explanation's tokens, teacher against student. Each is the mean plus
{settings.alpha:g} × the worst token.{estimate} The heavier the underline, the worse the token; ▲ and ▼ mark the
worst.{kept}</p>
{legend("kl", f"{kl} of explanation tokens")}
{legend("lp", "minus the log-prob of solution tokens")}
<p class="note">Keys: Tab to a text, ← → from token to token, Home, End, m to the marked one. Questions: {links}</p>
<input type="checkbox" id="numbers"> <label for="numbers" class="note">numbers beside all tokens</label>
<p id="at" role="status" data-kl="{kl}">Point at a token, or move to it with the keys, to see its number.</p>
<main>{"".join(body)}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def score_now(source, model, others, folder):
    """The rows with their rewards, in a new file in this folder, by distill.py. others: more of its flags."""
    out = folder / "scored.jsonl"
    rows = source / "samples.jsonl" if source.is_dir() else source
    limit = [] if "--limit" in others else ["--limit", str(ROWS)]
    command = [ROOT / "distill.py", "--score-file", rows, "--model", model, "--out", out, *limit, *others]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the rows could not be scored by: python {shlex.join(map(str, command))}")
    return out


def main():
    parser = flags.make_parser(__doc__)
    parser.add_argument("source", nargs="?", type=Path, default=Path("runs/teacher"), metavar="SOURCE",
                        help="a run folder, a file by distill.py, or with --model any rows with explanations")
    parser.add_argument("--model", type=flags.path, help="score the rows now, with this teacher")
    parser.add_argument("--questions", type=flags.number(int, 1), default=16, metavar="N", help="show the first N")
    parser.add_argument("--out", type=Path, default=Path("runs/reward.html"), metavar="FILE",
                        help="the page; the picture has the same name, with .png")
    args, others = parser.parse_known_args()
    if others and not args.model:
        parser.error(f"unknown argument {others[0]}: flags of distill.py go with --model, the teacher that scores")
    with tempfile.TemporaryDirectory() as folder:
        rows = score_now(args.source, args.model, others, Path(folder)) if args.model else args.source
        settings, groups = read_scored(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, page(args.source, settings, groups[: args.questions]))
    from reward_picture import draw, save_as  # matplotlib takes a second to load

    picture = args.out.with_suffix(".png")
    save_as(draw(groups[0], settings), picture)
    shown = groups[: args.questions]
    print(f"{args.out}: {sum(map(len, shown))} explanations of {len(shown)} of {len(groups)} questions. "
          f"{picture}: those of the first.")


if __name__ == "__main__":
    main()
