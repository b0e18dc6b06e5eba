"""Composition root: the console scripts `lightning` and `lit-clipq`."""

import logging
import os
import re
import shlex
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import reduce
from importlib.resources import files
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from lit_clipq.analysis.comparison import comparison_table, map_table
from lit_clipq.analysis.records import PointRecord
from lit_clipq.api import QuantizationReport
from lit_clipq.contracts import TrainingData
from lit_clipq.errors import ConfigError, LitClipqError
from lit_clipq.sensitivity import analysis_table
from lit_clipq.trainer import QuantTrainer, spawning_refused

SPAWNING = re.compile(r"spawn|fork|notebook")
"""What the names of strategies have in them that start their workers out of the running process."""


class Parser(LightningArgumentParser):
    """Lightning's parser; a parse error is this program's own kind of error (exit code 1, one sentence)."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the parse error as a `ConfigError`."""
        raise _own_error(ex) or ConfigError(_tidy(message)) from ex


class FitConfig(SaveConfigCallback):
    """Save the configuration beside the checkpoints of a `fit`; evaluations leave no file but their results."""

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Save when training starts."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class ClipQuantCLI(LightningCLI):
    """LightningCLI with fit, validate, test and export, and quantization as the top-level group `quantize`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the subcommands and those arguments of their methods that the CLI supplies itself."""
        own = {"model", "dataloaders", "datamodule", "verbose"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": own,
            "test": own,
            "export": {"model", "datamodule"},
            "analyze": own,
            "sweep": {"model", "datamodule"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "sweep":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        skip: set[str | int] = set(self.subcommands()[subcommand])
        # The method has the name of its group of options, so that it cannot be a group itself.
        added = parser.add_method_arguments(klass, subcommand, as_group=False, skip=skip)
        self._subcommand_method_arguments[subcommand] = added
        parser.set_defaults({"results": "results.jsonl"})
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--quantize.*`, `--results`, `--resume` and `--backend`."""
        from callbacks import Quantize

        whole_numbers_first(parser)
        parser.add_lightning_class_args(Quantize, "quantize")
        parser.add_argument("--results", type=str, default="results.json", help="Where the results are written (JSON).")
        parser.add_argument(
            "--resume",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Go on from the captions that an interrupted run left beside the results.",
        )
        parser.add_argument(
            "--backend",
            type=Literal["torch", "onnxruntime"],
            default="torch",
            help="`onnxruntime` evaluates a third time, with the integer products of an export.",
        )
        parser.link_arguments("backend", "trainer.backend")
        parser.link_arguments("results", "trainer.results")
        parser.link_arguments("resume", "trainer.resume")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a `--quantize.load` takes the place of the recipes and widths that configuration files name."""
        from callbacks.quantize import DECIDED_BY_ARTEFACT

        self._args = [str(arg) for arg in args]
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ConfigError(f"a configuration file is not UTF-8 text ({error}); give YAML") from error
        strategy = self.config[self.config.subcommand].trainer.get("strategy")
        if isinstance(strategy, str) and SPAWNING.search(strategy):
            raise ConfigError(spawning_refused(strategy))  # before model and data are made
        given = {str(arg).partition("=")[0] for arg in args}
        if self.config.subcommand == "analyze" and "--results" not in given:
            chosen = self.config[self.config.subcommand]  # an analysis does not take the place of a result
            chosen.results = chosen.trainer.results = "analysis.json"
        options = self.config[self.config.subcommand].get("quantize")
        if options is not None and options.load is not None:
            for name in DECIDED_BY_ARTEFACT:
                if f"--quantize.{name}" not in given:
                    options[name] = None

    def _parse_ckpt_path(self) -> None:
        """Leave the options to the configuration; a task checks the checkpoint that it is given."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer; what Lightning says about its options is this program's own kind of error."""
        if self.subcommand != "fit":
            kwargs["logger"] = False  # the record of an evaluation is its results file
        if self.subcommand == "sweep":
            kwargs["enable_progress_bar"] = False  # a sweep has one of its own
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise ConfigError(f"the options under --trainer cannot be used: {error}") from error

    def after_fit(self) -> None:
        """Say what a training has seen, what it reached, and where it lies."""
        trainer = cast(QuantTrainer, self.trainer)
        if not trainer.is_global_zero or not isinstance(self.datamodule, TrainingData):
            return
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in self.datamodule.training_counts().items()]
        lines = [f"trained on {', '.join(counts)}{_limited(trainer)}"]
        reached = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("train_")}
        if reached:
            told = [f"{name} {100 * value:.2f} %" for name, value in reached.items()]
            lines.append(f"last evaluation: {', '.join(told)}")
        saver: Any = trainer.checkpoint_callback
        written = saver and (saver.last_model_path or saver.best_model_path)
        if written:
            lines.append(f"evaluate it with `lightning validate` and --ckpt_path {written}")
        console().print("\n".join(lines), highlight=False, soft_wrap=True)

    def after_export(self) -> None:
        """Say what was exported, and where it lies."""
        trainer = cast(QuantTrainer, self.trainer)
        if trainer.exported is not None:
            from lit_clipq.export import told

            console().print(told(trainer.exported), highlight=False, soft_wrap=True)

    def after_validate(self) -> None:
        """Print the comparison."""
        self._print_comparison()

    def after_test(self) -> None:
        """Print the comparison."""
        self._print_comparison()

    def after_analyze(self) -> None:
        """Print the most sensitive layers, the farthest outliers, and what to paste."""
        trainer = cast(QuantTrainer, self.trainer)
        if trainer.is_global_zero and trainer.analysis is not None:
            console().print(analysis_table(trainer.analysis.rows, trainer.analysis.ranges))
            share = 100 * trainer.analysis.share
            note = f"The fewest layers, and the fewest operands, that make {share:.0f} % of a tower's predicted error:"
            console().print(note, highlight=False)
            console().print(trainer.analysis.patterns.as_yaml(), highlight=False, markup=False, soft_wrap=True)
            told = f"written to {trainer.results}; a picture over depth: lit-clipq report {trainer.results}"
            console().print(told, style="dim", highlight=False, soft_wrap=True)

    def before_sweep(self) -> None:
        """Tell the Trainer the command: for the records, and for Ray's workers."""
        trainer = cast(QuantTrainer, self.trainer)
        trainer.command = command_of(self._args)
        trainer.sweep_worker = measure_points, self._args

    def after_sweep(self) -> None:
        """Say where the points are."""
        trainer = cast(QuantTrainer, self.trainer)
        console().print(f"written to {trainer.swept}", style="dim", highlight=False)

    def _print_comparison(self) -> None:
        trainer = cast(QuantTrainer, self.trainer)
        if trainer.is_global_zero and trainer.comparison is not None:
            console().print(comparison_table(trainer.comparison))
            console().print(f"written to {trainer.results}", style="dim", highlight=False)
            if trainer.page is not None:
                console().print(f"pictures with captions in {trainer.page}", style="dim", highlight=False)


CLI = TypeVar("CLI", bound=ClipQuantCLI)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 after an error that is told in one line, 130 if interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _quieten()
    given = list(sys.argv[1:] if args is None else args)
    try:
        _check_neighbours()
        if given[:1] == ["report"]:
            _report(given[1:])
        else:
            _run(resolve_configs(given))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _make(kind: type[CLI], args: list[str]) -> CLI:
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=FitConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=QuantTrainer,
        trainer_defaults={"use_distributed_sampler": False},
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_class=Parser,
        args=args,
    )


def _run(args: list[str]) -> None:
    from callbacks.quantize import DryRunComplete  # not before it is known to be this project's

    try:
        _make(ClipQuantCLI, args)
    except DryRunComplete as done:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            _print_plan(done.report)


def _report(args: Sequence[str]) -> None:
    """Write the report of results that are there."""
    from lit_clipq.report import write_report

    parser = Words(prog="lit-clipq report", description="One page, figures and tables from the results of any runs.")
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="results.json, results.jsonl, analysis.json, or folders"
    )
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where the files go; default: report")
    options = parser.parse_args(args)
    report = write_report(options.paths, options.out)
    for problem in report.problems:
        console().print(f"left out: {problem}", style="dim", highlight=False, markup=False, soft_wrap=True)
    console().print(
        f"{report.points} network{'s' * (report.points != 1)}, {len(report.files)} files; open {report.page}",
        highlight=False,
        markup=False,
    )


class Words(ArgumentParser):
    """A parser of words that needs no configuration; what it refuses is this program's own kind of error."""

    def error(self, message: str) -> NoReturn:
        """Raise it as a `ConfigError`."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def command_of(args: Sequence[str]) -> str:
    """Return the command line of a sweep without what does not decide its numbers: where they are measured and kept."""
    kept, skip = [], False
    for arg in args:
        own = re.match(r"--(results|sweep\.(engine|address|workers|retries|shard|mix))(=|$)", arg)
        if not skip and own is None:
            kept.append(arg)
        skip = own is not None and own.group(3) == ""
    return shlex.join(["lightning", *kept])


class WorkerCLI(ClipQuantCLI):
    """Makes model, data and Trainer of a command line, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave it to whoever made this."""

    def measure(self, points: list[str], baseline: PointRecord | None, keep: Callable[[PointRecord], None]) -> None:
        """Measure points of a sweep."""
        self.before_sweep()
        options = self._prepare_subcommand_kwargs("sweep")
        cast(QuantTrainer, self.trainer).measure_points(
            **{"datamodule": None, **options}, points=points, baseline=baseline, keep=keep
        )


def measure_points(args: list[str], points: list[str], baseline: str | None, folder: str) -> Iterator[str]:
    """Measure points of a sweep, or the float network alone; what a Ray worker does.

    Args:
        args: The command line of the sweep.
        points: Ids.
        baseline: Line of the float network, where it is measured.
        folder: Where the sweep was started; the worker goes there, if there is such a folder on its machine.

    Yields:
        Lines of the results file, as soon as they are measured.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
    _quieten()
    lines: SimpleQueue[str | BaseException | None] = SimpleQueue()

    def measure() -> None:
        try:
            known = None if baseline is None else PointRecord.from_line(baseline)
            cli = _make(WorkerCLI, args)
            cli.measure(points, known, lambda record: lines.put(record.to_line()))
        except BaseException as error:  # handed to the thread that waits for lines
            lines.put(_own_error(error) or error)
        else:
            lines.put(None)

    Thread(target=measure, daemon=True).start()
    while (line := lines.get()) is not None:
        if isinstance(line, BaseException):
            raise line
        yield line


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace the value of each `--config` by a file that exists: as given, or a shipped one of that name.

    `coco_retrieval`, `coco_retrieval.yaml` and `configs/coco_retrieval.yaml` all name the shipped file, in a checkout
    and away from it.

    Raises:
        ConfigError: If there is neither a file nor a shipped configuration of that name.
    """
    resolved, expects_value = [], False
    for arg in args:
        option, equals, value = arg.partition("=")
        if expects_value:
            resolved.append(str(find_config(arg)))
        elif option in ("--config", "-c") and equals:
            resolved.append(f"{option}={find_config(value)}")
        else:
            resolved.append(arg)
        expects_value = arg in ("--config", "-c") and not expects_value
    return resolved


def find_config(name: str) -> Path:
    """Return the configuration file called `name`.

    Raises:
        ConfigError: If there is none; lists the shipped ones, or names the overlays that together say the same.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(files("lit_clipq.configs")))
    relative = name.removeprefix("./").removeprefix("configs/")
    for candidate in (shipped / relative, shipped / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.relative_to(shipped).with_suffix("").as_posix() for path in shipped.rglob("*.yaml"))
    _refuse_method_with_width(relative.removesuffix(".yaml"), known)
    close = get_close_matches(relative.removesuffix(".yaml"), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"no configuration file {name!r}; expected a path or one of {', '.join(known)}{hint}")


def _refuse_method_with_width(name: str, known: Sequence[str]) -> None:
    """Name the two overlays where the file of a method at a width was asked for."""
    named = re.search(r"quantize/(\w+)_(w\d+a\d+)$", name)
    overlays = [f"quantize/{part}" for part in named.groups()] if named else []
    if overlays and set(overlays) <= set(known):
        raise ConfigError(
            f"there is no configuration file {name!r}: method and width are overlays of their own; give "
            + " ".join(f"--config {overlay}" for overlay in overlays)
        )


def _limited(trainer: QuantTrainer) -> str:
    """Say how much of the training data an epoch has seen, where it was not all."""
    seen, there = trainer.num_training_batches, len(trainer.train_dataloader or ())
    return f", of which an epoch saw {seen:,} of {there:,} batches" if seen < there else ""


def whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Let `--trainer.limit_val_batches 1` be one batch, and not 1.0, all of them, in every process.

    `typing` remembers unions without regard to the order of their types, the parser builds some anew, and it takes the
    first type that fits: what was parsed before in a process decides.
    """
    actions: list[Any] = parser._actions
    for action in actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if {int, float} <= set(kinds):
            action._typehint = reduce(or_, sorted(kinds, key=lambda kind: (kind is float, kind is type(None))))


def console() -> Console:
    """Return a console for results; wide enough for whole names where the output is not a terminal."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=160)


def _print_plan(report: QuantizationReport) -> None:
    out = console()
    out.print(map_table(report.map))
    out.print(
        f"recipe {report.recipe}: {100 * report.map.float_share:.2f} % of the multiply-accumulates stay float; "
        f"{report.passes} pass over the calibration set, {report.memory_bytes / 1e6:.3f} MB stored beside the model; "
        "dry run, nothing was quantized or evaluated",
        highlight=False,
    )


def _told(error: Exception) -> str | None:
    """Tell in one line an error that a user can do something about; `None` for a fault of the program."""
    own = _own_error(error)  # the parser wraps what a constructor raises
    if own is None and not isinstance(error, OSError | MisconfigurationException):
        return None
    message = str(own or error).strip()
    if "\nOriginal Traceback" in message:  # a worker of a DataLoader puts its traceback into the message
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def _own_error(error: BaseException | None) -> LitClipqError | None:
    """Return the first error of this program's own in a chain of causes."""
    while error is not None and not isinstance(error, LitClipqError):
        error = error.__cause__ or error.__context__
    return error


def _check_neighbours() -> None:
    """Make sure that `datamodules` and `callbacks` are this project's.

    Raises:
        ConfigError: If another package of that name comes first on the import path.
    """
    expected = Path(__file__).resolve().parents[1]
    for name in ("callbacks", "datamodules"):
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or [str(spec.origin)]) if spec is not None else ["nowhere"]
        found = Path(places[0]).resolve().parent
        if found != expected:
            raise ConfigError(
                f"`{name}` was imported from {found}, expected {expected}: another package shadows it; "
                "rename that one or run from another folder"
            )


def _quieten() -> None:
    """Silence advice of Lightning's that does not fit an evaluation."""
    for message in (".*does not have many workers.*", ".*LightningCLI's args parameter.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _tidy(message: str) -> str:
    """Make one sentence of jsonargparse's nested report of what it tried."""
    lines = [re.sub(r"\s+", " ", line).strip(" -") for line in message.splitlines() if line.strip()]
    return "; ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
