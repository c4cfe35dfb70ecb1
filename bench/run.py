"""Perplexit and its peers side by side, in turns: `make bench`.

    python bench/run.py                     every usual section; a second call continues it
    python bench/run.py --only fp32-1024    sections whose name holds that
    python bench/run.py --only growth --only trick    what is measured only when named
    python bench/run.py --against OLD/src   this version beside an older one
    python bench/run.py --quick             less of everything: a minute for most sections
    python bench/run.py --list              the sections' names and questions

Each section is a JSON file in `build/bench/`, and all of them are tables in
`build/bench/report.md`. `--page docs/benchmarks.md` writes the page's generated parts.
"""

# Nothing is imported before the guard: each worker process runs this file once more, and those of
# `--against` import another version.
if __name__ == "__main__":
    from sidebyside.command import main

    raise SystemExit(main(description=__doc__))
