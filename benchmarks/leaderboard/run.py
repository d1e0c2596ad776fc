"""The leaderboard: which method helps, on real models, with intervals over seeds. One command for a whole tier.

    python benchmarks/leaderboard/run.py --data FOLDER [--tier small] [--time-limit 90m] [--only A B C] [--check]

The command prepares the data of ``board.yaml``, checks all methods, makes the missing runs by ``dataflex-cli compare``,
measures the costs of track C, and writes the result file and the pages. If it is stopped, the same command continues:
nothing is done twice. The committed result and its pages are replaced only by a result that lacks nothing of them; else
the result is written below ``--work`` alone. With ``--kept FOLDER`` the results of complete runs are read from a folder
and written to it, so that another machine can continue. Everything else is written below ``--work``. Relative paths
give the runs the same keys on every machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boards
import cost
import instruct
import page
import page_form
import pretraining
import yaml
from boards import Board, Mixtures, Places, Table, TableSettings, Tier

from dataflex import assets
from dataflex.cli import seconds_of
from dataflex.compare.experiment import load
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

LIMIT_REACHED = 124
"""Exit status of ``dataflex-cli compare`` at its time limit, and of this command."""

KEPT_FILES = ("key.json", "run.yaml", "complete.json")
"""Files of a complete run that another machine needs. The last one makes the run complete."""

SHARED_FILES = (
    "doremi.done",
    "doge.done",
    "regmix.done",
    "costs.json",
    "notes.json",
    "chance-*/*.json",
    "mixtures/*/dataflex/domain_weights.json",
    "mixtures/doremi/proxy/dataflex/domain_weights.json",
    "mixtures/regmix/*.csv",
)
"""Further files that another machine needs: else it would find other weights, and its runs would have other keys."""

TRACKS = ("A", "B", "C")


class Stopped(Exception):
    """A part of the work ended before it was complete. ``status`` is the exit status of the command."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def main() -> None:
    sys.path.append(str(HERE.parent))  # the other benchmarks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files that the board lists")
    parser.add_argument("--board", type=Path, default=HERE / "board.yaml")
    parser.add_argument("--tier", default="small", help="one of the tiers of the board")
    parser.add_argument("--only", nargs="+", choices=TRACKS, default=list(TRACKS), help="tracks")
    parser.add_argument("--work", type=Path, default=Path("leaderboard"), help="folder of the data and the runs")
    parser.add_argument("--jobs", type=int, help="runs at once (default: as dataflex-cli compare)")
    parser.add_argument("--time-limit", type=seconds_of, help="stop cleanly after this time, as 90m")
    parser.add_argument("--kept", type=Path, help="folder of the results of complete runs, read first and written last")
    parser.add_argument("--peer", type=Path, help="Python of an environment with bergson, for track C")
    parser.add_argument("--results", type=Path, help="result file; then no pages are written")
    parser.add_argument("--check", action="store_true", help="check the data files and the methods, and run nothing")
    options = parser.parse_args()
    board = boards.read(options.board)
    if options.tier not in board.tiers:
        sys.exit(f"--tier: there is no tier {options.tier!r}; it must be one of {', '.join(board.tiers)}.")
    sys.exit(Work(board, board.tiers[options.tier], options).run())


class Work:
    """The work of one tier. Its notes are kept, so that a later command continues."""

    def __init__(self, board: Board, tier: Tier, options: argparse.Namespace) -> None:
        self.board, self.tier, self.options = board, tier, options
        self.folder: Path = options.work / options.tier
        self.began = time.monotonic()
        self.notes_file = self.folder / "notes.json"
        self.seconds: dict[str, float] = {}
        """Name of a part -> seconds of all commands that worked on it."""
        self.failed = False
        self.written: dict[str, list[str]] = {}
        """Model and pool, or mixtures -> the training data sets that this command has written."""

    def run(self) -> int:
        """Do the missing work, write the results, and return the exit status."""
        missing = self._missing_files()
        if missing:
            print(self._said_of(missing), file=sys.stderr)
            return 2
        problems = self._problems()
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        if self.options.check:
            print("the data files are there, and all methods are accepted.")
            return 0
        status = 0
        self._restore()
        try:
            if "A" in self.options.only:
                self._chance()
            for track, work in (("A", self._instruct), ("B", self._mixtures), ("C", self._costs)):
                if track in self.options.only:
                    work()
        except Stopped as stop:
            status = stop.status
        except ConfigError as error:
            print("\n".join(self._said(error)), file=sys.stderr)
            status = 1
        if self.options.kept is not None:
            self._share(self.folder, self.options.kept, replace=True)
        self._write_results()
        if status == LIMIT_REACHED:
            print("the time limit is reached. Give the same command again to continue.")
        return status or int(self.failed)

    def _restore(self) -> None:
        """Read the notes of earlier commands. Files that are missing here are taken from the kept results first."""
        if self.options.kept is not None:
            self._share(self.options.kept, self.folder, replace=False)
        if self.notes_file.is_file():
            self.seconds = json.loads(self.notes_file.read_text())["seconds"]

    def _share(self, source: Path, target: Path, replace: bool) -> None:
        """Copy the small files that the key of a run, or the result file, is made of."""
        for pattern in SHARED_FILES:
            for file in source.glob(pattern):
                place = target / file.relative_to(source)
                if replace or not place.exists():
                    copied(file, place)

    def _missing_files(self) -> list[Path]:
        """Return the files of the board that the data folder lacks, for the asked tracks."""
        asked: list[Path] = []
        if self.tier.selection is not None and "A" in self.options.only:
            asked += instruct.files_of(self.board.pools.values(), self.board.targets.values())
        if self.tier.mixtures is not None and "B" in self.options.only:
            asked += pretraining.files()
        if self.tier.costs and "C" in self.options.only:
            asked += cost.FILES
        return sorted(file for name in set(asked) if not (file := self.options.data / name).is_file())

    def _said_of(self, missing: Sequence[Path]) -> str:
        """Return the message on missing files."""
        where = "benchmarks/leaderboard/README.md says what they are and where their content comes from."
        if not self.options.data.is_dir():
            head = f"--data: there is no folder {self.options.data}. It needs"
        else:
            head = f"--data: {self.options.data} lacks"
        names = "".join(f"\n  {file}" for file in missing)
        return f"{head} these files of the board, which are not part of the repository:{names}\n{where}"

    # Checks

    def _problems(self) -> list[str]:
        """Write the data, and return a line for each problem of the methods of the asked tracks, before any run.

        Files that are made by runs do not exist yet. So mixers that read them are left out, and the model itself
        stands for the reference model.
        """
        found: list[str] = []
        for file in self._experiments():
            try:
                load(file)
            except ConfigError as error:
                found += self._said(error)
        return list(dict.fromkeys(found))  # a method has the same problem for every target

    def _experiments(self) -> Iterator[Path]:
        """Write the experiments that have every method and order of the asked tracks, and yield their files."""
        selection, mixtures = self.tier.selection, self.tier.mixtures
        if selection is not None and "A" in self.options.only:
            for asked in selection.tables:
                for table in self._planned(asked, check=True):
                    if table.best_of is not None:
                        sections = self.board.methods_of(selection)
                        best = next((name for name in sections if "select" in sections[name]), None)
                        if best is None:
                            continue
                        table = boards.of_orders(table, best, self.board.orders)
                    elif not table.name.endswith(f"-vs-{selection.baselines[0]}"):
                        continue  # the same variants
                    yield self._written(f"check-{table.name}", table.experiment)
        if mixtures is not None and "B" in self.options.only:
            table = self._mixture_table(mixtures)
            made = {word for word, file in pretraining.words(self.folder / "mixtures").items() if Path(file).is_file()}
            mixers = self.board.mixers_of(mixtures)
            ready = [name for name in mixers if boards.words_in(mixers[name]) <= made]
            variants = {name: keys for name, keys in table.experiment["variants"].items() if name in ready}
            yield self._written(f"check-{table.name}", {**table.experiment, "variants": variants})

    def _written(self, name: str, experiment: dict[str, Any]) -> Path:
        file = self.folder / f"{name}.yaml"
        write_atomically(file, yaml.safe_dump(experiment, sort_keys=False).encode())
        return file

    def _said(self, error: ConfigError) -> Iterator[str]:
        """Yield each problem of an experiment as a line that names the method as the board has it."""
        for problem in error.problems:
            start, _, rest = problem.key.partition(".")
            name, _, key = rest.partition(".")
            if start == "variants" and (place := self.board.place_of(name)):
                said = f"{self.options.board}: {place}: {key.removeprefix('dataflex.')}: {problem.message}"
            else:
                said = f"{error.source}: {problem}"
            yield " ".join(said.split())

    # Track A

    def _chance(self) -> None:
        """Measure, before any training, whether the models answer the questions with choices better than guessing."""
        settings = self.tier.selection
        if settings is None or not settings.chance_questions:
            return
        for model in dict.fromkeys(str(self._model(table)["model_name_or_path"]) for table in settings.tables):
            output = self._chance_folder(model)
            tasks = [
                {**self._task(name), "file": str((self.options.data / target.held_out).resolve())}
                | {"limit": settings.chance_questions}
                for name, target in self.board.targets.items()
                if target.has_choices
            ]
            if all((output / f"{task['name']}.json").is_file() for task in tasks):
                continue
            file = self.folder / f"{output.name}.yaml"
            write_atomically(file, yaml.safe_dump(tasks, sort_keys=False).encode())
            command = [sys.executable, "-m", "dataflex", "eval", model, "--tasks", str(file), "--output", str(output)]
            self._call(output.name, command)

    def _chance_folder(self, model: str) -> Path:
        return self.folder / f"chance-{re.sub('[^A-Za-z0-9.-]+', '-', model)}"

    def _model(self, table: TableSettings) -> dict[str, Any]:
        return self.board.models[table.model].settings

    def _task(self, name: str) -> dict[str, Any]:
        """Return the settings of a target's task, with the absolute path of its examples."""
        given = dict(self.board.targets[name].task)
        if "fewshot_file" in given:
            given["fewshot_file"] = str((self.options.data / given["fewshot_file"]).resolve())
        return {"name": name, **given}

    def _instruct(self) -> None:
        settings = self.tier.selection
        if settings is None:
            return
        for table in settings.tables:
            self._tables_of(table)

    def _tables_of(self, asked: TableSettings) -> None:
        settings = self.tier.selection
        assert settings is not None
        tables = list(self._planned(asked))
        self._shared_work(asked, tables)
        for table in tables:
            if table.best_of is not None:
                first = json.loads((self.folder / table.best_of / "comparison.json").read_text())
                best = boards.best_method(first, table.metric, table.experiment["variants"])
                if best is None:
                    continue
                table = boards.of_orders(table, best, self.board.orders)
            self._compare(table)

    def _planned(self, asked: TableSettings, check: bool = False) -> Iterator[Table]:
        """Write the data of a model and a pool, and yield their tables. For a check nothing else needs to exist."""
        settings = self.tier.selection
        assert settings is not None
        model = self.board.models[asked.model]
        targets = {name: self.board.targets[name] for name in asked.targets}
        tokenizer = assets.resolve(str(model.settings["model_name_or_path"]))
        places = Places(
            data=self.folder / f"data-{asked.pool}",
            embeddings=self.folder / "embeddings",
            reference=Path(tokenizer) if check else self.folder / f"reference-{asked.model}-{asked.pool}",
            output=self.folder,
        )
        pool = self.board.pools[asked.pool]
        group = f"{asked.model}-{asked.pool}"
        if group not in self.written:
            self.written[group] = instruct.write_data(
                self.options.data, places.data, pool, targets, settings, tokenizer
            )
        domains = self.written[group]
        samples = sum(len(json.loads((places.data / f"{name}.json").read_text())) for name in domains)
        evaluated = [*(instruct.held_out(name) for name in targets), instruct.OTHERS]
        base = boards.selection_base(model, domains, evaluated, settings, places)
        tasks = [
            {"file": str((places.data / f"{name}_questions.jsonl").resolve()), **self._task(name)}
            for name in targets
            if settings.task_questions
        ]
        yield from boards.selection_tables(self.board, self.tier, asked, base, places, tasks, samples)

    def _shared_work(self, asked: TableSettings, tables: Sequence[Table]) -> None:
        """Make what several methods read: the embeddings of an encoder and the reference model."""
        settings = self.tier.selection
        assert settings is not None
        group = tables[0].group
        base = tables[0].experiment["base"]
        methods = self.board.methods_of(settings)
        readers = [name for name, keys in methods.items() if "embeddings" in boards.words_in(keys)]
        for target in asked.targets:
            table = next(each for each in tables if f"-{target}-" in each.name)
            for name in readers:
                section = table.experiment["variants"][name]["dataflex"]
                config = {**base, "output_dir": str(self.folder / "embed"), "dataflex": section}
                self._once(f"embeddings/{group}/{target}/{name}", ["embed"], config)
        if "reference" in boards.words_in(methods):
            config = {**base, "dataset": instruct.REFERENCE, "num_train_epochs": 1.0}
            config |= {"output_dir": str(self.folder / f"reference-{group}"), "overwrite_output_dir": True}
            config = {key: value for key, value in config.items() if key not in ("eval_dataset", "do_eval")}
            self._once(f"reference/{group}", ["train"], config)

    # Track B

    def _mixtures(self) -> None:
        settings = self.tier.mixtures
        if settings is None:
            return
        folder, size = self.folder / "mixtures", settings.size
        table = self._mixture_table(settings)
        words = boards.words_in(self.board.mixers_of(settings))
        if "doremi" in words:
            self._once("doremi", ["doremi"], pretraining.doremi_settings(folder, size))
        if "doge" in words:
            self._once("doge", ["train"], pretraining.doge_settings(folder, size))
        if {"regmix_mixtures", "regmix_losses"} & words:
            self._once("regmix", ["regmix"], pretraining.regmix_settings(folder, size))
        self._compare(table)

    def _mixture_table(self, settings: Mixtures) -> Table:
        """Write the data of track B and return its table."""
        folder, size, baseline = self.folder / "mixtures", settings.size, settings.baseline
        if "mixtures" not in self.written:
            pretraining.prepare(self.options.data, folder, size)
            self.written["mixtures"] = list(pretraining.DOMAINS)
        name = f"mixtures-vs-{baseline}"
        mixers = self.board.mixers_of(settings)
        output = self.folder / name
        experiment = pretraining.experiment_settings(folder, output, size, settings.seeds, mixers, baseline)
        title = f"Mixtures of seven domains: against `{baseline}`"
        sentences = tuple(pretraining.sentences(size, settings.seeds))
        return Table(name, "B", title, sentences, experiment, "mixtures")

    # Track C

    def _costs(self) -> None:
        """Measure the parts of track C that are not measured yet, each alone on the machine."""
        settings = self.tier.costs
        if settings is None:
            return
        output = self.folder / "costs.json"
        known = json.loads(output.read_text()) if output.is_file() else {"measured": {}, "skipped": {}}
        for part in self._parts():
            if part in known["measured"] and (part not in known["skipped"] or self.options.peer is None):
                continue
            command = [sys.executable, str(HERE / "cost.py"), "--data", str(self.options.data), "--only", part]
            command += ["--output", str(output), "--device", settings.device, "--samples", str(settings.samples)]
            command += ["--peer", str(self.options.peer)] if self.options.peer else []
            self._call(f"costs-{part}", command)

    def _parts(self) -> list[str]:
        """Return the parts of track C that the tier measures.

        On a CUDA device LESS is left out: its authors project with a kernel for this device, which is not used here.
        """
        settings = self.tier.costs
        if settings is None:
            return []
        return [part for part in cost.PARTS if settings.device == "cpu" or not part.startswith("less")]

    # Steps

    def _once(self, name: str, verb: Sequence[str], config: dict[str, Any]) -> None:
        """Run ``dataflex-cli VERB FILE`` with a configuration, unless it is on record that this has ended well."""
        place = self.folder / name.replace("/", "-")
        file, done = place.with_suffix(".yaml"), place.with_suffix(".done")
        text = yaml.safe_dump(config, sort_keys=False)
        if done.is_file() and done.read_text() == text:
            return
        write_atomically(file, text.encode())
        self._call(name, [sys.executable, "-m", "dataflex", *verb, str(file)])
        write_atomically(done, text.encode())

    def _compare(self, table: Table) -> None:
        """Make the missing runs of a table. Equal runs are taken over from other tables and from the kept results."""
        file = self._written(table.name, table.experiment)
        command = [sys.executable, "-m", "dataflex", "compare", str(file)]
        command += ["--jobs", str(self.options.jobs)] if self.options.jobs else []
        keys = {run.key for run in load(file).runs}
        others = [other for other in sorted(self.folder.glob(f"{table.group}-*")) if other.name != table.name]
        if self.options.kept:
            others += sorted(self.options.kept.glob(f"{table.group}-*"))
        for other in others:
            complete = other.glob("runs/*/*/complete.json")
            if any(json.loads(each.read_text()).get("key") in keys for each in complete):
                command += ["--merge", str(other)]
        try:
            self._call(table.name, command, ends_well=(0, 1))
        finally:
            self._keep(table)
        write_atomically(self.folder / table.name / "table.json", json_text(_described(table), indent=2).encode())

    def _keep(self, table: Table) -> None:
        """Copy the small files of the complete runs of a table to the folder of kept results."""
        if self.options.kept is None:
            return
        for complete in (self.folder / table.name).glob("runs/*/*/complete.json"):
            for name in KEPT_FILES:
                copied(complete.parent / name, self.options.kept / complete.parent.relative_to(self.folder) / name)

    def _call(self, name: str, command: list[str], ends_well: Sequence[int] = (0,)) -> None:
        """Run a command with its output in a log, count its seconds, and stop at the time limit.

        Raises:
            Stopped: at the time limit, or if the command does not end well.
        """
        left = self._time_left()
        if left is not None and left < 5:
            raise Stopped(LIMIT_REACHED)
        if left is not None and "compare" in command:
            command, left = [*command, "--time-limit", f"{left:.0f}s"], None
        log = self.folder / f"{name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{shlex.join(command)} >> {log}", flush=True)
        began = time.monotonic()
        status = _waited(command, log, left)
        seconds = time.monotonic() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        write_atomically(self.notes_file, json_text({"seconds": self.seconds}, indent=2).encode())
        print(f"{name}: status {status} after {seconds:.0f} s", flush=True)
        if status not in ends_well:
            if status != LIMIT_REACHED:
                print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
            raise Stopped(status)
        self.failed |= status != 0

    def _time_left(self) -> float | None:
        limit: float | None = self.options.time_limit
        return None if limit is None else limit - (time.monotonic() - self.began)

    # Results

    def _write_results(self) -> None:
        """Write the result file of everything that is complete so far, and the pages.

        The committed ones are left as they are if they have more.
        """
        from overhead import machine

        here = machine()
        tables = list(self._tables())
        costs = self.folder / "costs.json"
        known_costs = json.loads(costs.read_text()) if costs.is_file() else None
        result = {
            "tier": self.options.tier,
            "about": self.tier.about,
            "command": " ".join(["python", *sys.argv]),
            "date": str(datetime.datetime.now(datetime.UTC).date()),
            "seconds": round(sum(self.seconds.values())),
            "machine": here,
            "versions": here["versions"],
            "methods": self._methods(tables),
            "tables": tables,
            "missing": list(self._missing_parts(tables, known_costs)),
            "chosen": {table["name"]: _chosen(table["comparison"]) for table in tables},
            "above_chance": list(self._accuracies()),
            "shared_costs": list(self._shared_costs()),
            "claims": list(self._claims(tables, known_costs)),
            "costs": known_costs,
        }
        content = (json_text(result, indent=1) + "\n").encode()
        if self.options.results is not None:
            self.options.results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.options.results, content)
            print(f"results: {self.options.results}")
            return
        own = self.folder / "result.json"
        committed = ROOT / "benchmarks" / "results" / "leaderboard" / f"{self.options.tier}.json"
        write_atomically(own, content)
        lacking = _lacking(own, committed)
        if lacking:
            written = page.write_pages([own], self.folder)
            print(
                f"results: {', '.join(map(str, [own, *written]))}. {committed} and its pages stay as they are, because "
                f"the new result lacks {lacking}. Delete {committed.name} first to replace it all the same."
            )
            return
        copied(own, committed)
        print(f"results: {committed}")
        for file in page.write_pages(sorted(committed.parent.glob("*.json")), ROOT / "docs"):
            print(f"page: {file}")

    def _methods(self, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return method -> its section in the board, for the methods of the tables."""
        sections: dict[str, Any] = {}
        if self.tier.selection is not None:
            own = self.board.methods_of(self.tier.selection)
            sections |= own
            for name, section in own.items():
                sections |= {f"{name}-{order}": {**section, "order": keys} for order, keys in self.board.orders.items()}
        if self.tier.mixtures is not None:
            sections |= {name: {"mix": keys} for name, keys in self.board.mixers_of(self.tier.mixtures).items()}
        used = {name for table in tables for name in table["comparison"]["variants"]}
        return {name: section for name, section in sections.items() if name in used}

    def _tables(self) -> Iterator[dict[str, Any]]:
        """Yield every table whose command has ended, with its results."""
        for file in sorted(self.folder.glob("*/table.json")):
            comparison = json.loads((file.parent / "comparison.json").read_text())
            seconds = round(self.seconds.get(file.parent.name, 0.0))
            yield {**json.loads(file.read_text()), "seconds": seconds, "comparison": comparison}

    def _missing_parts(self, tables: Sequence[dict[str, Any]], costs: dict[str, Any] | None) -> Iterator[str]:
        """Yield the names of the tables and of the parts of track C that are not complete."""
        settings, known = self.tier.selection, {table["name"] for table in tables}
        planned = [f"mixtures-vs-{self.tier.mixtures.baseline}"] if self.tier.mixtures is not None else []
        if settings is not None:
            ends = [f"vs-{name}" for name in settings.baselines] + (["orders"] if settings.orders else [])
            for asked in settings.tables:
                planned += [f"{asked.model}-{asked.pool}-{target}-{end}" for target in asked.targets for end in ends]
        yield from (name for name in planned if name not in known)
        yield from (part for part in self._parts() if costs is None or part not in _parts_in(costs))

    def _accuracies(self) -> Iterator[dict[str, Any]]:
        """Yield the accuracies of the untrained models, with their standard errors."""
        for folder in sorted(self.folder.glob("chance-*")):
            for file in sorted(folder.glob("*.json")):
                found = json.loads(file.read_text())
                yield {
                    "task": file.stem,
                    "model": folder.name.removeprefix("chance-"),
                    "accuracy": found["metrics"]["acc"]["value"],
                    "stderr": found["metrics"]["acc"]["stderr"],
                    "chance": found["chance"],
                    "questions": found["samples"],
                }

    def _shared_costs(self) -> Iterator[dict[str, Any]]:
        """Yield the seconds of the work that several runs read, the methods that read it, and their tables."""
        kinds = {
            "embeddings": "embeddings of the pool and the validation samples",
            "reference": "reference model, trained on samples outside the pool",
            "doremi": "DoReMi's reference and proxy",
            "doge": "DoGE's proxy",
            "regmix": "RegMix's small models",
        }
        names = [file.parent.name for file in sorted(self.folder.glob("*/table.json"))]
        found: dict[tuple[str, str, str], dict[str, float]] = {}
        for part, seconds in self.seconds.items():
            kind, *rest = part.split("/")
            if kind in kinds:
                group, target, method = [*rest, *["mixtures", "", kind][len(rest) :]]
                method = "rho_loss" if kind == "reference" else method
                found.setdefault((kind, group, target), {})[method] = seconds
        # All methods that read an encoder's embeddings share the pool's, which the first of them computes.
        for (kind, group, target), by_method in found.items():
            tables = [name for name in names if name.startswith(f"{group}-") and (not target or f"-{target}-" in name)]
            total = round(sum(by_method.values()), 1)
            if tables:
                yield {"what": kinds[kind], "seconds": total, "used_by": list(by_method), "tables": tables}

    def _claims(self, tables: Sequence[dict[str, Any]], costs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Yield each claim of the board for each table that tests it."""
        for claim in self.board.claims:
            said = {"text": claim.text, "source": claim.source}
            if claim.track == "C" and costs is not None and costs["parts"]:
                yield {**said, "costs": self._parts()}
            for table in tables:
                comparison = table["comparison"]
                if (table["track"], comparison["baseline"]) != (claim.track, claim.baseline):
                    continue
                methods = [name for name in comparison["variants"] if name not in (claim.baseline, boards.RANDOM)]
                variants = [name for name in claim.variants or methods if name in methods]
                if not variants:
                    continue
                yield {**said, "table": table["name"], "metric": comparison["claims"][0], "variants": variants}


def _chosen(comparison: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return variant -> share of each data set among the samples of its decisions, for the variants that decide."""
    return {name: found["chosen"] for name, found in comparison["variants"].items() if found["chosen"]}


def copied(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, into a folder that is made if it does not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, source.read_bytes())


def _waited(command: list[str], log: Path, seconds: float | None) -> int:
    """Run a command with its output in a log and return its exit status.

    Ctrl-C reaches the command directly, and SIGTERM is handed on. In both cases the command ends its own processes, and
    this function waits for that. It also does so after the given seconds, and returns ``LIMIT_REACHED``.
    """
    with log.open("a") as stream, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return LIMIT_REACHED
        except KeyboardInterrupt:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _parts_in(costs: dict[str, Any]) -> set[str]:
    """Return the parts of track C that are measured, or skipped for a reason."""
    return {*costs["parts"], *costs["skipped"]}


def _described(table: Table) -> dict[str, Any]:
    """Return a table's part of the result file, without its results."""
    said = {"name": table.name, "track": table.track, "title": table.title, "setting": list(table.setting)}
    return {**said, "pool_samples": table.pool_samples, "step_samples": table.step_samples}


def _lacking(new: Path, old: Path) -> str:
    """Return what a result file lacks of an earlier one, in words. Empty: nothing."""
    if not old.is_file():
        return ""
    try:
        before = page_form.read(old)
    except ConfigError as error:
        return f"a comparison with it: {error}"
    return "; ".join(page_form.lost(page_form.read(new), before))


if __name__ == "__main__":
    main()
