"""A branching: which tasks compute which layer together. A tree, from the images to the tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.sharing.groupings import Grouping, check_num_tasks, refined, relabelled


@dataclass(frozen=True)
class Branching:
    """The grouping of the tasks in each layer, and the architecture of each task's path."""

    tasks: tuple[str, ...]
    groupings: tuple[Grouping, ...]
    """Per layer of the encoder; each refines the one before, since tasks never meet again."""
    paths: tuple[Architecture, ...] | None = field(default=None)
    """Of an EDNAS backbone: per task the blocks on its way. Tasks of a group have the same."""

    def __post_init__(self) -> None:
        """Check that it is a tree.

        Raises:
            ValueError: if it is none, or tasks that share a layer have other blocks there.
        """
        check_num_tasks(len(self.tasks))
        before: Grouping = (0,) * len(self.tasks)
        if not self.groupings:
            raise ValueError("a branching needs at least one layer")
        for layer, labels in enumerate(self.groupings):
            if len(labels) != len(self.tasks) or labels != relabelled(labels):
                raise ValueError(
                    f"layer {layer}: expected a group label for each of {len(self.tasks)} tasks, "
                    f"numbered in order of first appearance, got {list(labels)}"
                )
            if labels != refined(before, labels):
                raise ValueError(
                    f"layer {layer}: {list(labels)} joins tasks that {list(before)} had parted"
                )
            before = labels
        if self.paths is not None:
            self._check_paths(self.paths)

    def _check_paths(self, paths: tuple[Architecture, ...]) -> None:
        if len(paths) != len(self.tasks):
            raise ValueError(f"expected {len(self.tasks)} paths, got {len(paths)}")
        for layer, labels in list(enumerate(self.groupings))[1:]:
            for task, label in enumerate(labels):
                first = labels.index(label)
                if layer <= len(paths[task].blocks) and (
                    paths[task].blocks[layer - 1] != paths[first].blocks[layer - 1]
                ):
                    raise ValueError(
                        f"layer {layer}: {self.tasks[first]} and {self.tasks[task]} share it, but "
                        f"their paths have different blocks there"
                    )

    # Shapes of trees ------------------------------------------------------------------------

    @classmethod
    def from_routes(
        cls,
        tasks: Sequence[str],
        routes: Sequence[Sequence[int]],
        paths: tuple[Architecture, ...] | None = None,
    ) -> "Branching":
        """Of the candidate that each task takes in each layer, `[tasks][layers]`.

        Raises:
            ValueError: if the paths of tasks that share a layer have other blocks there.
        """
        grouping: Grouping = (0,) * len(tasks)
        groupings = []
        for labels in zip(*routes, strict=True):
            grouping = refined(grouping, labels)
            groupings.append(grouping)
        return cls(tuple(tasks), tuple(groupings), paths)

    @classmethod
    def shared(
        cls, tasks: Sequence[str], num_layers: int, path: Architecture | None = None
    ) -> "Branching":
        """One encoder for all tasks."""
        return cls.vanilla(tasks, num_layers, num_layers, path)

    @classmethod
    def separate(
        cls, tasks: Sequence[str], num_layers: int, path: Architecture | None = None
    ) -> "Branching":
        """An encoder for each task: its single-task network."""
        return cls.vanilla(tasks, num_layers, 0, path)

    @classmethod
    def vanilla(
        cls,
        tasks: Sequence[str],
        num_layers: int,
        num_shared: int,
        path: Architecture | None = None,
    ) -> "Branching":
        """Some layers for all tasks, the others for each (BMTAS section 4.3).

        Raises:
            ValueError: if more layers are to be shared than there are.
        """
        if not 0 <= num_shared <= num_layers:
            raise ValueError(f"num_shared: expected 0 to {num_layers}, got {num_shared}")
        together, apart = (0,) * len(tasks), tuple(range(len(tasks)))
        groupings = (together,) * num_shared + (apart,) * (num_layers - num_shared)
        return cls(tuple(tasks), groupings, None if path is None else (path,) * len(tasks))

    @classmethod
    def random(
        cls,
        tasks: Sequence[str],
        num_layers: int,
        generator: np.random.Generator,
        path: Architecture | None = None,
    ) -> "Branching":
        """A random tree: groups part in two at uniform layers, until a random number of groups.

        Raises:
            ValueError: for too few or too many tasks.
        """
        check_num_tasks(len(tasks))
        count = len(tasks)
        num_parts = int(generator.integers(count))
        layers = sorted(generator.integers(num_layers, size=num_parts).tolist())
        labels: Grouping = (0,) * count
        groupings = []
        for layer in range(num_layers):
            while layers and layers[0] == layer:
                layers.pop(0)
                labels = _parted(labels, generator)
            groupings.append(labels)
        return cls(tuple(tasks), tuple(groupings), None if path is None else (path,) * count)

    def permuted(self, order: Sequence[int]) -> "Branching":
        """The same tree with other tasks at its ends (BMTAS table 3, `Permutations`).

        Args:
            order: task `i` takes the place of task `order[i]`.

        Raises:
            ValueError: if that is no permutation of the tasks.
        """
        if sorted(order) != list(range(len(self.tasks))):
            raise ValueError(f"order: expected a permutation of the tasks, got {list(order)}")
        return Branching(
            self.tasks,
            tuple(relabelled([labels[i] for i in order]) for labels in self.groupings),
            None if self.paths is None else tuple(self.paths[i] for i in order),
        )

    # What it holds --------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return len(self.groupings)

    @property
    def num_groups(self) -> tuple[int, ...]:
        """How often each layer is computed."""
        return tuple(max(labels) + 1 for labels in self.groupings)

    def first_task(self, layer: int, group: int) -> int:
        """The first task of a group; its path tells what the group's layer is."""
        return self.groupings[layer].index(group)

    def sharing_tasks(self, layer: int, group: int) -> int:
        """How many tasks a group has."""
        return self.groupings[layer].count(group)

    def parent(self, layer: int, group: int) -> int:
        """The group of the layer before that a group comes from."""
        return self.groupings[layer - 1][self.first_task(layer, group)]

    def __str__(self) -> str:
        """For example `layers 1-4: all tasks; layers 5-10: depth | segmentation+normals`.

        Layers count from 1, the stem.
        """
        parts, start = [], 0
        for layer in range(1, self.num_layers + 1):
            if layer < self.num_layers and self.groupings[layer] == self.groupings[start]:
                continue
            span = f"{start + 1}" if layer == start + 1 else f"{start + 1}-{layer}"
            parts.append(f"layers {span}: {self._groups(start)}")
            start = layer
        return "; ".join(parts)

    def _groups(self, layer: int) -> str:
        labels = self.groupings[layer]
        if max(labels) == 0:
            return "all tasks"
        groups = [
            "+".join(name for name, label in zip(self.tasks, labels, strict=True) if label == group)
            for group in range(max(labels) + 1)
        ]
        return " | ".join(groups)

    # JSON -----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Tasks, groupings per layer, and the path of each task or null."""
        paths = None
        if self.paths is not None:
            paths = {
                task: path.to_json() for task, path in zip(self.tasks, self.paths, strict=True)
            }
        return {
            "tasks": list(self.tasks),
            "groupings": [list(labels) for labels in self.groupings],
            "architectures": paths,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Branching":
        """Read what `to_json` gives.

        Raises:
            ValueError: if a key is missing, of another type, or it is no tree.
        """
        try:
            tasks = tuple(str(task) for task in data["tasks"])
            groupings = tuple(tuple(int(label) for label in row) for row in data["groupings"])
            held = data["architectures"]
            paths = None
            if held is not None:
                paths = tuple(Architecture.from_json(held[task]) for task in tasks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"expected tasks, groupings and architectures as branching.json has them: {error}"
            ) from None
        return cls(tasks, groupings, paths)


def nearest(
    candidates: Sequence[Branching], cost: Callable[[Branching], float], wanted: float
) -> Branching:
    """The branching whose cost is nearest to a wanted one; the first of equals."""
    return min(candidates, key=lambda one: abs(cost(one) - wanted))


def _parted(labels: Grouping, generator: np.random.Generator) -> Grouping:
    """One of the groups of two or more tasks, in two; a change only where there is one."""
    groups = [group for group in set(labels) if labels.count(group) > 1]
    if not groups:
        return labels
    group = groups[int(generator.integers(len(groups)))]
    members = [task for task, label in enumerate(labels) if label == group]
    # Each way to part them has the same probability: any mask but none and all.
    mask = int(generator.integers(1, 2 ** len(members) - 1))
    leaves = {task for bit, task in enumerate(members) if mask >> bit & 1}
    return relabelled([-1 if task in leaves else label for task, label in enumerate(labels)])
