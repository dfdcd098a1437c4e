"""The two methods that search what tasks share: where they part, and which operators they share."""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oneshot_ednas.models.encoder import Chain
from oneshot_ednas.schema import read_json
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_search import BranchingSearch
from oneshot_ednas.sharing.derive_branched import (
    DerivedBranching,
    derive_branched,
    most_probable,
    smallest_cost,
)
from oneshot_ednas.sharing.groupings import all_groupings, grouping_probabilities
from oneshot_ednas.sharing.operator_search import OperatorSearch, rank_policies
from oneshot_ednas.sharing.operators import (
    OperatorNetwork,
    operator_network,
    policy_learning_rates,
)
from oneshot_ednas.sharing.policy import Policy
from oneshot_ednas.sharing.rank_branched import rank_branchings
from oneshot_ednas.sharing.tracing import trace_backbone
from oneshot_ednas.sharing_run import Plan, SharingRun
from oneshot_ednas.store import write_json
from oneshot_ednas.training import note, numpy_generator


class BranchRun(SharingRun):
    """Where tasks part, and, with `backbone.architecture: search`, of which blocks."""

    command, method, found = "branch", "branching", "branched"

    @property
    def found_file(self) -> Path:
        """The branching, and what the search came to."""
        return self.files.branching

    @property
    def search_config(self) -> Any:
        """The branching search.

        Raises:
            ValueError: if the config has none.
        """
        if self.config.branching is None:
            raise ValueError(
                "the config has no section branching; see configs/sharing_streets_tiny.yaml"
            )
        return self.config.branching

    @property
    def _is_within_budget(self) -> bool:
        return bool(self.search_config.objective == "budget")

    @property
    def target_ms(self) -> float | None:
        """That of the objective `budget`."""
        latency = self.config.latency
        return latency.target_ms if self._is_within_budget and latency is not None else None

    def _check_search(self) -> None:
        latency = self.config.latency
        if not self._is_within_budget or latency is None or self.latencies is None:
            return
        least = smallest_cost(self.latencies, list(self.tasks))
        if not latency.target_ms >= least:
            raise ValueError(
                f"latency.target_ms is {latency.target_ms:.4g} ms, below the smallest branched "
                f"network of {self.encoder.name}: {least:.4g} ms; raise it"
            )

    @cached_property
    def search(self) -> BranchingSearch:
        """The search, from its checkpoint where there is one."""
        config = self.search_config
        counted = self._is_within_budget or config.resource == "latency"
        costs = self.latencies if counted else self.macs
        assert costs is not None
        search = BranchingSearch(
            config,
            self.encoder,
            self.tasks,
            costs=costs,
            macs=self.macs,
            target=self.target_ms,
            splits={name: self.frames.part(name) for name in ("weights", "alpha")},
            augmentation=self.config.data.augment,
            seed=self.config.seed,
            device=self.device,
        )
        search.resume(self.files.checkpoint(self.method))
        return search

    def find(self) -> None:
        """Search and derive, where that is not done."""
        if self.found_file.exists():
            return
        search = self.search
        self.run_search(search, f"{len(self.encoder.layers)} layers")
        with self.timed("derive"):
            derived = self._derive(search)
        probabilities = search.parameters.probabilities().routes.detach().cpu().double()
        names = [",".join(map(str, grouping)) for grouping in all_groupings(len(self.tasks))]
        rows = grouping_probabilities(probabilities).clamp(0, 1).tolist()
        write_json(
            self.found_file,
            derived.branching.to_json()
            | {
                "layers": [layer.name for layer in self.encoder.layers],
                "candidates": [list(route) for route in derived.candidates],
                "probabilities": probabilities.tolist(),
                "grouping_probabilities": [dict(zip(names, row, strict=True)) for row in rows],
                "search": {
                    "expected": float(search.expected_cost().detach()),
                    "unit": search.costs.unit,
                    "found": derived.cost,
                    "shared": search.shared_cost,
                    "lambda": None if self._is_within_budget else search.config.resource_weight,
                    "macs": search.macs,
                    "alarms": search.alarms(),
                },
            },
        )
        note(f"branch: {derived.cost:.4g} {search.costs.unit}, {derived.branching}")

    def _derive(self, search: BranchingSearch) -> DerivedBranching:
        if not self._is_within_budget:
            return most_probable(search.parameters, search.costs, list(self.tasks))
        assert search.target is not None
        found = derive_branched(
            search.parameters,
            search.costs,
            list(self.tasks),
            target=search.target,
            num_candidates=search.config.num_candidates,
            generator=numpy_generator(self.config.seed, "candidates"),
        )
        ranked = rank_branchings(
            found,
            search,
            target=search.target,
            calibration=self.frames.part("weights"),
            validation=self.frames.part("validation"),
            config=self.config.derive,
        )
        return ranked[0].derived

    def found_plan(self) -> Plan:
        """The derived branching."""
        branching = Branching.from_json(read_json(self.found_file))
        return self.branched_plan(branching, str(branching))


class ShareRun(SharingRun):
    """Which operators each task shares, copies and skips."""

    command, method, found = "share", "operators", "operators"

    @property
    def found_file(self) -> Path:
        """The policy, and what the search came to."""
        return self.files.policy

    @property
    def search_config(self) -> Any:
        """The operator search.

        Raises:
            ValueError: if the config has none.
        """
        if self.config.operators is None:
            raise ValueError(
                "the config has no section operators; see configs/sharing_streets_tiny.yaml"
            )
        return self.config.operators

    def _check_search(self) -> None:
        if self.config.backbone.has_choices:
            raise ValueError(
                "operator sharing takes one architecture: backbone.architecture base or a file"
            )
        if "permuted" in self.config.baselines:
            raise ValueError("baselines: permuted is of a branching; leave it out")
        with torch.random.fork_rng(devices=[]):
            trace_backbone(
                Chain(self.encoder),
                torch.zeros(1, 3, *self.config.data.image_size),
                self.config.backbone.operator_types,
            )

    @cached_property
    def search(self) -> OperatorSearch:
        """The search, from its checkpoint where there is one."""
        search = OperatorSearch(
            self.search_config,
            partial(Chain, self.encoder),
            self.encoder.build_decoder,
            self.tasks,
            splits={name: self.frames.part(name) for name in ("weights", "alpha")},
            augmentation=self.config.data.augment,
            seed=self.config.seed,
            device=self.device,
            operator_types=self.config.backbone.operator_types,
        )
        search.resume(self.files.checkpoint(self.method))
        return search

    def find(self) -> None:
        """Search and rank, where that is not done."""
        if self.found_file.exists():
            return
        search = self.search
        self.run_search(search, f"{len(search.supermodel.operators)} operators")
        with self.timed("derive"):
            ranked = rank_policies(
                search,
                search.candidates(),
                calibration=self.frames.part("weights"),
                validation=self.frames.part("validation"),
                calibration_batches=self.config.derive.calibration_batches,
                batch_size=self.config.derive.batch_size,
            )
        policy = ranked[0].policy
        described = search.supermodel.describe(policy, search.policy.probabilities())
        held = {
            "expected": None,
            "unit": None,
            "lambda": search.config.regularization,
            "candidates": [
                {"accuracy": one.accuracy, "shares": one.policy.shares()} for one in ranked
            ],
            "alarms": search.alarms(),
        }
        write_json(self.found_file, described | {"search": held})
        note(f"share: {policy}, best of {len(ranked)} policies")

    def found_plan(self) -> Plan:
        """The ranked policy's network, with fresh weights."""
        policy = Policy.from_json(read_json(self.found_file))
        return Plan(
            what=f"operators: {policy}",
            build=partial(self._build, policy),
            identity=policy.to_json(),
            lr_scales=policy_learning_rates(policy),
            num_seeds=self.config.retrain.num_seeds,
        )

    def _build(self, policy: Policy) -> OperatorNetwork:
        decoders: Mapping[str, nn.Module] = {
            name: self.encoder.build_decoder(count) for name, count in self.out_channels.items()
        }
        return operator_network(
            partial(Chain, self.encoder),
            decoders,
            torch.zeros(1, 3, *self.config.data.image_size),
            policy,
            self.config.backbone.operator_types,
        )
