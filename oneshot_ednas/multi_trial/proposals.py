"""Which architecture to try next: PyGlove's regularized evolution, or uniform draws."""

import random
from typing import Any, Literal

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import MultiTrialConfig
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.training import derived_seed

Algorithm = Literal["evolution", "random"]


class Proposals:
    """Architectures to try, one after the other; deterministic in seed, config and feedback.

    Evolution: as long as fewer than `population_size` trials have ended, uniform draws; then the
    best of a tournament among the `population_size` latest ended trials, mutated: one choice,
    drawn uniformly, is set to another of its options. Random search draws uniformly, with the same
    first draws for the same seed.

    PyGlove's own uniform mutator may draw the option that was there. Where an architecture is not
    trained twice, such copies of one lucky trial fill the population and the search stands still.

    Source:
        Real et al., Regularized Evolution for Image Classifier Architecture Search, AAAI 2019,
        https://arxiv.org/abs/1802.01548
    """

    def __init__(
        self, algorithm: Algorithm, space: SearchSpace, config: MultiTrialConfig, seed: int
    ) -> None:
        """Begin anew.

        Args:
            algorithm: `evolution` or `random`.
            space: what to draw from.
            config: population and tournament.
            seed: of all draws.

        Raises:
            ValueError: if the space is one network.
        """
        import pyglove as pg  # takes half a second

        if space.is_fixed:
            raise ValueError(f"space {space.name} is one network: nothing to search")
        self._pyglove = pg
        self.space = space
        seed = derived_seed(seed, "proposals")
        # The seed of `regularized_evolution` is that of first draws and tournaments.
        self._mutator = random.Random(derived_seed(seed, "mutator"))
        self._generator = (
            pg.geno.Random(seed=seed)
            if algorithm == "random"
            else pg.evolution.regularized_evolution(
                mutator=self._mutate,
                population_size=config.population_size,
                tournament_size=config.tournament_size,
                seed=seed,
            )
        )
        self._spec = pg.dna_spec(space.to_pyglove())
        self._generator.setup(self._spec)
        self._open: dict[int, Any] = {}
        self.count = 0
        """Proposals so far; the next one's number."""

    def _mutate(self, parents: list[Any]) -> list[Any]:
        children = []
        for parent in parents:
            child = self.space.mutate(self.space.decode(parent.to_numbers()), self._mutator)
            dna = self._pyglove.DNA(list(self.space.encode(child)))
            children.append(dna.use_spec(self._spec))
        return children

    def propose(self) -> Architecture:
        """The next architecture; its number counts from 0."""
        # What it checks is PyGlove's own; a third of the time.
        with self._pyglove.enable_type_check(False):
            dna = self._generator.propose()
        self._open[self.count] = dna
        self.count += 1
        return self.space.decode(dna.to_numbers())

    def feedback(self, number: int, reward: float) -> None:
        """Tell the reward of a proposal, once."""
        self._generator.feedback(self._open.pop(number), reward)

    @property
    def population(self) -> list[Architecture]:
        """Possible parents, oldest first; empty for random search."""
        dnas = getattr(self._generator, "population", [])
        return [self.space.decode(dna.to_numbers()) for dna in dnas]
