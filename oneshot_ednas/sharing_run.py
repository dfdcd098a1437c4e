"""A run that searches what tasks share: search, derive, retrain with baselines, evaluate, report.

Each stage reads what the one before wrote, so a run can be cut anywhere and go on.
"""

import datetime
import itertools
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oneshot_ednas.config import TaskSharingConfig
from oneshot_ednas.deploy import deploy
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.macs import module_macs
from oneshot_ednas.report import RunPictures, write_sharing_report
from oneshot_ednas.retrain import NetworkTraining, Watch, train_to_end, unwatched
from oneshot_ednas.reward import deltas
from oneshot_ednas.run_folder import Frames, RunFolder, over_seeds, versions
from oneshot_ednas.schema import find_file, read_json
from oneshot_ednas.sharing.backbone import make_encoder
from oneshot_ednas.sharing.branched import BranchedNetwork, branched_network, learning_rate_scales
from oneshot_ednas.sharing.branching import Branching, nearest
from oneshot_ednas.sharing.branching_search import BranchingSearch
from oneshot_ednas.sharing.costs import BranchCosts, latency_costs, mac_costs
from oneshot_ednas.sharing.operator_search import OperatorSearch
from oneshot_ednas.sharing.operators import (
    OperatorNetwork,
)
from oneshot_ednas.store import write_json
from oneshot_ednas.tasks import lower_is_better
from oneshot_ednas.training import Metrics, derived_seed, evaluate, note, numpy_generator

NUM_PICTURES = 4
NUM_RANDOM_TREES = 500
"""Drawn trees; `random` is that whose cost is nearest to the found one's, and another one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A network to train from scratch, once per seed."""

    what: str
    """In one line, for the report."""
    build: Callable[[], nn.Module]
    identity: object
    """As of `NetworkTraining`."""
    lr_scales: Mapping[str, float]
    """As of `NetworkTraining`: 1 / the number of tasks that share a part."""
    branching: Branching | None = None
    num_seeds: int = 1


class SharingRun(RunFolder[TaskSharingConfig], ABC):
    """What the runs of both methods share: a backbone, baselines, trainings and their scores."""

    command: str
    method: str
    """Also the stage of the search, in the log and in checkpoints."""
    found: str
    """Name of the network that the search found."""

    def __init__(self, config: TaskSharingConfig, folder: Path) -> None:
        """Load and check everything that can be wrong before a file is written.

        Args:
            config: the config, its files named as `load_config` does.
            folder: the run folder; need not exist yet.

        Raises:
            ValueError: for whatever is wrong in config, backbone, table, data or target.
            FileNotFoundError: for a missing file.
        """
        super().__init__(config, folder)
        self.encoder = make_encoder(config.backbone)
        self.macs: BranchCosts = self._count_macs()
        self.latencies: BranchCosts | None = None
        if config.latency is not None and self.encoder.space is not None:
            table = LatencyTable.load(find_file(config.latency.table))
            self.table = replace(table, name=Path(config.latency.table).name)
            self.table.check_image_size(*config.data.image_size)
            self.table.check_calibrated(allowed=config.latency.allow_uncalibrated)
            self.latencies = latency_costs(self.encoder.space, self.table, self.out_channels)
        self._check_search()
        split_seed = self.search_config.split_seed
        self.frames = Frames.load(
            config.data,
            self.tasks,
            splits=self.search_config.splits,
            seed=config.seed if split_seed is None else split_seed,
        )
        self.frames.check_batches(
            f"{self.method}.batch_size", self.search_config.batch_size, "weights", "alpha"
        )
        self.frames.check_batches("retrain.batch_size", config.retrain.batch_size)
        self.frames.check_scored(self.tasks)

    def _count_macs(self) -> BranchCosts:
        size = self.config.data.image_size
        try:
            return mac_costs(self.encoder, size, self.out_channels)
        except Exception as error:
            # A backbone that is not of the package may fail in its own way.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"backbone {self.config.backbone.name} does not run on images of "
                f"{size[0]}x{size[1]}: {reason}; its layers and decoders take what they read as "
                f"tensors, and do not depend on tensors' values"
            ) from error

    @property
    @abstractmethod
    def search_config(self) -> Any:
        """The config of the search, with its splits and batch size."""

    def _check_search(self) -> None:
        """Refuse what the search cannot do, before the data are read."""

    @property
    def target_ms(self) -> float | None:
        """What the search keeps inside; None where it keeps to no latency."""
        return None

    @abstractmethod
    def find(self) -> None:
        """Search and derive, where that is not done."""

    @abstractmethod
    def found_plan(self) -> Plan:
        """The network that the search found."""

    @property
    @abstractmethod
    def found_file(self) -> Path:
        """What the search found; it holds its figures, too. A run that has it takes it for done."""

    def run_search(self, search: BranchingSearch | OperatorSearch, size: str) -> None:
        """Take the steps that are left, and tell what looks wrong.

        Args:
            search: the search.
            size: of what is searched, in words.
        """
        if search.step < search.config.steps:
            note(
                f"{self.command}: {self.encoder.name}, {size}, {len(self.tasks)} tasks, "
                f"{search.config.steps} steps on {self.device}"
            )
            left = search.config.steps - search.step
            with (
                self.timed(self.method) as add_time,
                self.watched(self.method, search, left),
            ):
                search.run(self.files.folder, self.files.checkpoint(self.method), add_time)
        for alarm in search.alarms():
            note(f"{self.command}: warning: {alarm}")

    def search_figures(self) -> dict[str, Any]:
        """What the results tell of the search: cost, lambda, time, alarms."""
        held = read_json(self.found_file)["search"]
        seconds = sum(self.seconds.get(stage, 0.0) for stage in (self.method, "derive"))
        return {**held, "seconds": seconds}

    def open(self, *, resume: bool) -> None:
        """Start the run folder, or go on with it.

        Raises:
            ValueError: as of `RunFolder.open`, or if the folder is of the other method.
        """
        path = self.files.folder / "method.json"
        held = read_json(path) if path.exists() else self.method
        if held != self.method:
            raise ValueError(
                f"{self.files.folder} already holds a run of {held}, not of {self.method}; choose "
                f"another --out"
            )
        super().open(resume=resume)

    @property
    def _contents(self) -> dict[Path, tuple[str, str]]:
        contents = self.frames.contents(self.files)
        contents[self.files.folder / "method.json"] = ("method", json.dumps(self.method) + "\n")
        if self.encoder.space is not None:
            contents[self.files.space] = ("search space", self.encoder.space.to_yaml())
        if self.latencies is not None:
            contents[self.files.table] = ("latency table", self.table.to_text())
        return contents | super()._contents

    # Networks -------------------------------------------------------------------------------

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """The networks to train, by name."""
        found = self.found_plan()
        plans = {self.found: found}
        for name in self.config.baselines:
            plans |= self._baseline(name, found)
        return plans

    def _baseline(self, name: str, found: Plan) -> dict[str, Plan]:
        """The networks of a baseline; none where all of its trees are the found one."""
        tasks, count = list(self.tasks), len(self.encoder.layers)
        path = None if self.encoder.space is None else self.encoder.space.base_architecture
        # What a policy's network takes on the device is unknown: it is compared by multiply-adds.
        costs = self.macs if found.branching is None else self.latencies or self.macs
        generator = numpy_generator(self.config.seed, f"{name} branching")
        match name:
            case "separate":
                one = Branching.separate(tasks, count, path)
                return {name: self.branched_plan(one, "an encoder per task: single-task networks")}
            case "shared":
                one = Branching.shared(tasks, count, path)
                return {name: self.branched_plan(one, "one encoder for all tasks")}
            case "vanilla":
                trees = [Branching.vanilla(tasks, count, n, path) for n in range(1, count)]
                what = "all tasks part at once"
            case "random":
                drawn = range(NUM_RANDOM_TREES)
                trees = [Branching.random(tasks, count, generator, path) for _ in drawn]
                what = "a drawn tree"
            case _:
                return self._permuted(found, generator)
        trees = [tree for tree in trees if not _is_same(tree, found.branching)]
        if not trees:
            return {}
        one = nearest(trees, costs.of, self._cost_of(found, costs))
        return {name: self.branched_plan(one, f"{what}; {one}")}

    def _permuted(self, found: Plan, generator: np.random.Generator) -> dict[str, Plan]:
        """The found tree with other tasks at its ends: each tree once, and never the found one."""
        assert found.branching is not None
        orders = generator.permutation(list(itertools.permutations(range(len(self.tasks)))))
        trees = dict.fromkeys(found.branching.permuted(order) for order in orders.tolist())
        others = [tree for tree in trees if not _is_same(tree, found.branching)]
        return {
            f"permuted_{number}": replace(
                self.branched_plan(tree, f"the found tree, tasks permuted; {tree}"), num_seeds=1
            )
            for number, tree in enumerate(others[: self.config.num_permutations], start=1)
        }

    def branched_plan(self, branching: Branching, what: str) -> Plan:
        """The network of a branching."""
        return Plan(
            what=what,
            build=partial(branched_network, self.encoder, branching, self.out_channels),
            identity=branching.to_json(),
            lr_scales=learning_rate_scales(branching),
            branching=branching,
            num_seeds=self.config.retrain.num_seeds,
        )

    def _cost_of(self, plan: Plan, costs: BranchCosts) -> float:
        return self._gmacs_of(plan) if plan.branching is None else costs.of(plan.branching)

    def _gmacs_of(self, plan: Plan) -> float:
        if plan.branching is not None:
            return self.macs.of(plan.branching)
        return module_macs(plan.build(), torch.empty(1, 3, *self.config.data.image_size)) / 1e9

    # Training and scores --------------------------------------------------------------------

    def retrain(self) -> None:
        """Train all networks from scratch, where that is not done."""
        for name, plan in self.plans.items():
            for number in range(plan.num_seeds):
                stage = f"retrain.{name}.seed_{number}"
                if not self._is_trained(stage):
                    with self.timed(stage) as add_time:
                        self._train(plan, stage, number, add_time, partial(self.watched, stage))

    def _train(
        self,
        plan: Plan,
        stage: str,
        number: int,
        on_save: Callable[[], None] = lambda: None,
        watch: Watch = unwatched,
    ) -> nn.Module:
        training = NetworkTraining(
            self.config.retrain,
            plan.build,
            self.tasks,
            self.frames.train,
            identity=plan.identity,
            label=plan.what,
            stage=stage,
            augmentation=self.config.data.augment,
            seed=derived_seed(self.config.seed, "retrain", number) if number else self.config.seed,
            device=self.device,
            lr_scales=plan.lr_scales if self.config.divides_learning_rate else None,
        )
        return train_to_end(
            training,
            folder=self.files.folder,
            checkpoint=self.files.checkpoint(stage),
            on_save=on_save,
            watch=watch,
        )

    def _is_trained(self, stage: str) -> bool:
        return self.has_finished(stage, self.config.retrain.steps)

    def evaluate(self) -> dict[str, Any]:
        """Score the trained networks on the test split and write `results.json`."""
        with self.timed("evaluate"):
            networks = {name: self._figures(name, plan) for name, plan in self.plans.items()}
        baseline = "separate" if "separate" in networks else self.found
        self.set_gains(networks)
        results = {
            "method": self.method,
            "backbone": self.encoder.name,
            "found": self.found,
            "baseline": baseline,
            "target_ms": self.target_ms,
            "networks": networks,
            "search": self.search_figures(),
            "seconds": self.seconds,
            "memory": self.memory,
            "seed": self.config.seed,
            "num_frames": {"train": len(self.frames.train), "test": len(self.frames.test)},
            "date": datetime.date.today().isoformat(),
            "versions": versions(self.device),
        }
        write_json(self.files.results, results)
        return results

    def _figures(self, name: str, plan: Plan) -> dict[str, Any]:
        scores, network = [], None
        for number in range(plan.num_seeds):
            network = self._train(plan, f"retrain.{name}.seed_{number}", number)
            scores.append(self._score(network))
        assert network is not None
        return {
            "what": plan.what,
            "parameters": sum(p.numel() for p in network.parameters()),
            "shared_parameters": _shared_fraction(network, plan),
            "gmacs": self._gmacs_of(plan),
            "latency_ms": self._latency_of(plan),
            "metrics": over_seeds(scores, statistics.fmean),
            "metrics_std": over_seeds(scores, statistics.stdev) if len(scores) > 1 else None,
            "branching": None
            if plan.branching is None
            else [list(labels) for labels in plan.branching.groupings],
            "seeds": plan.num_seeds,
        }

    def _latency_of(self, plan: Plan) -> float | None:
        if plan.branching is None or self.latencies is None:
            return None
        return self.latencies.of(plan.branching)

    def _score(self, network: nn.Module) -> Metrics:
        return evaluate(
            network,
            self.frames.test,
            self.tasks,
            batch_size=self.config.derive.batch_size,
            device=self.device,
        )

    def set_gains(self, networks: Mapping[str, dict[str, Any]]) -> None:
        """Give each network, as `delta`, its gain over `separate` in percent (eq. 9-12).

        Metrics that `separate` has 0 of have no gain in percent and are left out. None where there
        is no such network, or a task has no metric left.
        """
        baseline = networks["separate"]["metrics"] if "separate" in networks else None
        names = {
            task: [name for name in row.reward_metrics if baseline and baseline[task][name] > 0]
            for task, row in self.tasks.items()
        }
        errors = lower_is_better(self.tasks)
        for row in networks.values():
            row["delta"] = None
            if baseline is not None and all(names.values()):
                found = deltas(row["metrics"], baseline, names=names, lower_is_better=errors)
                row["delta"] = {"overall": found.overall, "tasks": dict(found.tasks)}

    def report(self) -> Path:
        """Write `report.html` with trees or policies, curves and pictures of predictions."""
        with self.timed("report"):
            plan = self.plans[self.found]
            network = self._train(plan, f"retrain.{self.found}.seed_0", 0)
            pictures = RunPictures.taken(
                network, self.frames.test, self.tasks, num_pictures=NUM_PICTURES, device=self.device
            )
        return write_sharing_report(
            self.files.folder,
            tasks=self.tasks,
            pictures=pictures,
            class_names=self.frames.test.class_names,
        )

    def export(self) -> dict[str, Any] | None:
        """Write the found network, first seed, as `model.tflite`, check it, and report.

        Returns:
            The report, or None where there is no latency table of a device, or no latency of the
            network in it.

        Raises:
            RuntimeError: if the file is not what the Edge TPU takes.
        """
        plan = self.plans[self.found]
        predicted_ms = self._latency_of(plan)
        if predicted_ms is None:
            return None
        with self.timed("export"):
            report = deploy(
                self._train(plan, f"retrain.{self.found}.seed_0", 0),
                self.files.model,
                self.files.export,
                name=self.found,
                architecture=plan.what,
                calibration=self.frames.train,
                splits={"test": self.frames.test},
                tasks=self.tasks,
                table=self.table,
                predicted_ms=predicted_ms,
                batch_size=self.config.derive.batch_size,
                seed=self.config.seed,
                device=self.device,
            )
        note(f"export: {report['file']}, {report['size_bytes'] / 2**20:.2f} MiB")
        for check in ("not_verified", "not_compiled"):
            if report[check] is not None:
                note(f"export: {check.replace('_', ' ')}: {report[check]}")
        return report

    def run_all(self) -> dict[str, Any]:
        """All stages that are not done yet, in order; returns the results."""
        self.find()
        self.retrain()
        results = self.evaluate()
        try:
            self.export()
        finally:
            self.report()  # also of a network that the device does not take
        return results


def _is_same(one: Branching, other: Branching | None) -> bool:
    return other is not None and one.groupings == other.groupings


def _shared_fraction(network: nn.Module, plan: Plan) -> float:
    """Share of the encoder's parameters that two or more tasks use."""
    if isinstance(network, OperatorNetwork):
        return network.shared_fraction
    assert isinstance(network, BranchedNetwork)
    assert plan.branching is not None
    shared = sum(
        sum(p.numel() for p in network.candidates(layer)[group].parameters())
        for layer, count in enumerate(plan.branching.num_groups)
        for group in range(count)
        if plan.branching.sharing_tasks(layer, group) > 1
    )
    return float(shared / network.num_encoder_parameters)
