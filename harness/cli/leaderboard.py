"""`bench leaderboard`: the published page, and whether its numbers may be believed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.again import renewed
from harness.cli.common import as_json, echo, loaded, note, print_json, writable

if TYPE_CHECKING:
    from leaderboard.results import Results

results_option: Callable[[Any], Any] = click.option(
    "--results", "root", type=click.Path(path_type=Path), help="A folder of results; the published ones by default."
)


def results_root(root: Path | None) -> Path:
    from leaderboard.results import published_root

    return published_root() if root is None else root


def read_results(root: Path | None) -> list[Results]:
    from leaderboard import results

    return results.read(results_root(root))


def quiet(_: str) -> None:
    """Shows no progress."""


def built_page(page: Path | None) -> None:
    """Raise click.UsageError unless `page` is a built page; None is no page."""
    if page is not None and not (page / "index.html").is_file():
        raise click.UsageError(f"{page}: no index.html; bench leaderboard build -o {page} writes it")


@click.group(short_help="Build, check and serve the published page.")
def leaderboard() -> None:
    """The published page: built from records alone, checked by anybody."""


@leaderboard.command(short_help="Write the page: HTML, Markdown, JSON, CSV.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write into.")
@click.option(
    "--analyses",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of folders that bench analyse wrote; cells link to theirs.",
)
@results_option
@as_json
def build(out: Path, analyses: Path | None, root: Path | None, as_json: bool) -> None:
    """Write the page into a folder, from records alone; the same records give the same bytes."""
    from leaderboard import site

    writable(out)
    counts = site.build(read_results(root), out, analyses)
    if as_json:
        print_json({"out": out, **counts})
    else:
        words = ", ".join(f"{number} {name}" for name, number in counts.items())
        echo(f"{out / 'index.html'}: {words}")


@leaderboard.command(short_help="Recompute the numbers, verify digests, protocol and controls.")
@results_option
@click.option("--page", type=click.Path(path_type=Path), help="Also check that this built page is what they give.")
@click.option("--keys", is_flag=True, help="Also count the rows that would have another key today.")
@as_json
def check(root: Path | None, page: Path | None, keys: bool, as_json: bool) -> int:
    """Check results: form, digests, sizes, every score from its per-sample values, keys from their ingredients,
    thresholds and knowledge from the plugins, rows from the suite, one protocol per table, controls, nothing copied,
    dirty or partial. Ends with 5 where anything is wrong, each problem with its file. A row has another key
    today where code, weights or plugins that it depends on have changed since: nothing wrong, but worth knowing."""
    from harness.runs.declared import Declared
    from leaderboard import check as checks, check_lines

    built_page(page)
    registry, place = loaded((), strict=False), results_root(root)
    found = checks.check(place, page, Declared(registry), quiet if as_json else note)
    if keys:
        for suite in read_results(root):
            changed = len(renewed(suite.records, registry))
            words = f"{changed} of {len(suite.records)} rows would have another key today"
            found.notes.append(checks.Problem(str(suite.folder), words))
    if as_json:
        print_json(found)
    else:
        for remark in check_lines.summed(found.notes, place):
            note(f"note: {remark}")
        for problem in found.problems:
            echo(check_lines.brief(problem, place))
        echo(check_lines.last(found))
    return Exit.mismatch if found.problems else Exit.ok


@leaderboard.command(short_help="Hold the benchmark's suite against its protocol.")
@click.option("--freeze", "model", metavar="MODEL", help="Freeze the cells of this model that are not frozen yet.")
@click.option(
    "--attack", help="With --freeze: only the cells of this attack, a preset or a spec, and the clean model's."
)
@as_json
def protocol(model: str | None, attack: str | None, as_json: bool) -> int:
    """Hold the suite of the benchmark against its protocol and against what is frozen of it, and say how many cells
    each model has. Ends with 5 if something differs. A frozen cell stays as it is: a change is another version."""
    from harness.runs import suite as suites
    from harness.runs.declared import Declared
    from leaderboard import protocol as protocols

    registry, mine = loaded((), strict=False), protocols.shipped()
    draft = suites.read(suites.find_suite(mine.suite))
    planned, current = suites.expand(draft, registry), Declared(registry).current
    if attack is not None and model is None:
        raise click.UsageError("--attack needs --freeze MODEL")
    if model is not None:
        only = None if attack is None else registry.canonical("attacks", attack)
        path = protocols.freeze(planned, model, current, only)
        note(f"wrote {path}; commit it before the first of its new cells is computed")
    problems = protocols.problems(planned, current)
    problems += [f"spells {spec} out; write a preset" for spec in protocols.unnamed(draft.grids)]
    states = protocols.states(planned)
    if as_json:
        print_json({"protocol": mine, "problems": problems, "models": states})
    else:
        for words in problems:
            echo(f"suite {mine.suite} {words}")
        for name, state in states.items():
            digest = f", sha256 {state['sha256'][:12]}" if state["sha256"] else ""
            echo(f"{name}: {state['cells']} cells, {state['frozen']} frozen{digest}")
    return Exit.mismatch if problems else Exit.ok


@leaderboard.command(short_help="Put the rows of a run into a folder of results.")
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--to", type=click.Path(path_type=Path), required=True, help="Usually leaderboard/results/SUITE.")
@as_json
def add(run: Path, to: Path, as_json: bool) -> None:
    """Put the records and pictures that `bench run -o RUN` wrote into a folder of results, a file for each. A row of
    the same cell under another key gives way to the new one; files of all other rows stay as they are."""
    from harness.runs.declared import Declared
    from leaderboard import add_results, check as checks

    writable(to, "--to")
    done = add_results.add(run, to, Declared(loaded((), strict=False)).current)
    if lacking := checks.refused(done.records):
        key, words = lacking[0]
        note(f"warning: the check refuses {len(lacking)} of these rows, such as {key[:12]}: {words}")
    if as_json:
        print_json({"folder": done.folder, "records": len(done.records)})
    else:
        echo(f"{done.folder}: {len(done.records)} records")


@leaderboard.command(short_help="Prepare a pull request with the rows of a run.")
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--name", help="The folder of results, which is the suite's name; default: that of --suite.")
@click.option("--suite", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A suite of your own.")
@click.option("--branch", default=None, help="The branch to make; default: results/NAME and a digest of the rows.")
@click.option(
    "--checkout", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path(), show_default="here",
    help="A clean checkout of this project.",
)  # fmt: skip
@as_json
def submit(run: Path, name: str | None, suite: Path | None, branch: str | None, checkout: Path, as_json: bool) -> int:
    """Put the rows that `bench run -o RUN` wrote on a branch of a checkout, check them beside all others, as the pull
    request's check does, and print the text of a pull request. Nothing is sent anywhere: you push the branch. Ends with
    5 if the check finds something; the branch stays, so that it can be mended."""
    from harness.runs.declared import Declared
    from leaderboard import check as checks, check_lines, submission

    if name is None:
        if suite is None:
            raise click.UsageError("give --suite FILE, or --name NAME for a suite that the checkout has")
        name = suite.stem
    registry = loaded((), strict=False)
    made = submission.prepare(run, suite, checkout, name, branch, Declared(registry).current)
    home, declared = checkout / submission.HOME, Declared(registry, submission.suites(checkout))
    found = checks.check(home, None, declared, quiet if as_json else note)
    notes = [each for each in found.notes if Path(each.file).is_relative_to(home / name)]
    if as_json:
        problems, said = ([str(each) for each in every] for every in (found.problems, notes))
        print_json({**asdict(made), "problems": problems, "notes": said})
    else:
        echo(f"# {made.title}\n\n{made.body}")
        for line in check_lines.summed(notes, home):
            note(f"note: {line}")
        for problem in found.problems:
            note(check_lines.brief(problem, home))
        note(check_lines.last(found))
        mended = "mend it and commit, then " if found.problems else ""
        note(f"on branch {made.branch}, {len(made.files)} files; {mended}push it: git push -u origin {made.branch}")
    return Exit.mismatch if found.problems else Exit.ok


@leaderboard.command(short_help="Fetch the published results onto this machine.")
@click.option("--from", "source", metavar="URL_OR_DIR", help="An archive, its https address, or a folder of results.")
@as_json
def pull(source: str | None, as_json: bool) -> None:
    """Fetch the published results of this version, for machines without a checkout. They come from the project's
    releases, or from --from. Every record is verified by its digest before anything is replaced."""
    from leaderboard import releases
    from leaderboard.results import pulled_root

    into = pulled_root()
    writable(into, "BENCH_RESULTS")
    records = releases.pull(source, into)
    if as_json:
        print_json({"folder": into, "records": records})
    else:
        echo(f"{into}: {records} records")


@leaderboard.command(short_help="Write the results into one archive, as a release has it.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The archive to write, a .tar.gz.")
@results_option
@as_json
def archive(out: Path, root: Path | None, as_json: bool) -> None:
    """Write the published results into one archive, which `bench leaderboard pull` reads. The same results give the
    same bytes."""
    from leaderboard import releases

    writable(out, file=True)
    releases.archive(results_root(root), out)
    size = out.stat().st_size
    if as_json:
        print_json({"out": out, "bytes": size})
    else:
        echo(f"{out}: {size / 1e6:.1f} MB")


@leaderboard.command(short_help="Show the page in a browser on this machine.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@results_option
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one.")
def serve(folder: Path | None, root: Path | None, port: int) -> None:
    """Serve FOLDER, a built page, on this machine only; without FOLDER the page is built first. Ctrl-C ends it."""
    import tempfile

    from leaderboard import site

    built_page(folder)
    if folder is not None:
        _serve(folder, port)
        return
    with tempfile.TemporaryDirectory(prefix="bench-page-") as made:
        site.build(read_results(root), Path(made))
        _serve(Path(made), port)


def _serve(folder: Path, port: int) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    except OSError as error:
        raise click.UsageError(f"--port {port}: {error.strerror}; name another, or 0 for any free one") from None
    with server:
        echo(f"http://127.0.0.1:{server.server_address[1]}/index.html (Ctrl-C ends)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
