# SPDX-License-Identifier: MIT
"""
Draw every figure and write every table of the READMEs from the committed logs.

    python figures/make_figures.py
    python figures/make_figures.py --runs runs/student runs/eval/toy    one's own evaluations beside the paper's tables
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags

import benchmarks
import machines
import paper_results
import reward_picture
import smollm2_results
import study_tables
import toy_map
import toy_results
import toy_time
import toy_tokens

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "figures/README.md", ROOT / "rlt/README.md")
TABLES = {  # what a page calls the block: the function that writes it
    "toy table": study_tables.accuracy_table,
    "claims": study_tables.claims_table,
    "variants": study_tables.variants_table,
    "cells": toy_map.cells_table,
    "seen": toy_tokens.seen_table,
    "wall time": toy_time.wall_time_table,
    "smollm2": smollm2_results.students_table,
    "smollm2 training": smollm2_results.curves_table,
    "smollm2 explanations": smollm2_results.explanations_table,
    "smollm2 answers": smollm2_results.answers_table,
    "smollm2 RL": smollm2_results.rl_table,
    "smollm2 public": smollm2_results.multiarith_table,
    "bench text": benchmarks.scoring_table,
    "small step": benchmarks.small_step_table,
    "gpu": benchmarks.gpu_tables,
    "kernel": benchmarks.kernel_text,
    "machines": machines.machine_table,
    "hours": machines.hours_text,
    "faults": benchmarks.faults_list,
    "models": benchmarks.models_table,
}


def replace_block(pages, name, text):
    """Put the text between the two marks of this block, which must be on exactly one of the pages."""
    pattern = rf"(<!-- {name}: written by figures/make_figures.py -->\n).*?(<!-- end of {name} -->)"
    found = 0
    for page in pages:
        changed, count = re.subn(pattern, lambda marks: marks[1] + text + marks[2], page.read_text(), flags=re.DOTALL)
        if count:
            page.write_text(changed)
        found += count
    if found != 1:
        names = " and ".join(str(page) for page in pages)
        raise ValueError(f"{found} blocks are marked <!-- {name}: ... --> in {names}, expected one: change the marks.")


def main():
    parser = flags.make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", type=flags.path, metavar="RUN", help="draw these folders' evaluations "
                        "(eval_math500.json and the like) over the paper's Table 1, Table 2 and Figure 1, nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="FOLDER", help="of --runs: for the "
                        "pictures")
    args = parser.parse_args()
    if args.runs:
        return paper_results.draw(args.runs, args.out)
    for draw in (*toy_results.FIGURES, *toy_map.FIGURES, *toy_tokens.FIGURES, *benchmarks.FIGURES,
                 *reward_picture.FIGURES, *smollm2_results.FIGURES):
        draw()
    for name, write in TABLES.items():
        replace_block(PAGES, name, write())


if __name__ == "__main__":
    main()
