"""Steps that are not finite: left out exactly, counted, bounded, and never waited for."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot_ednas.guard import StepGuard, finite_or, fused_adam, fused_sgd


def adam(parameters):
    return fused_adam(parameters, learning_rate=0.1, weight_decay=1e-3)


def sgd(parameters):
    return fused_sgd(parameters, learning_rate=0.1, weight_decay=1e-3, momentum=0.9)


def losses(*values: float) -> dict[str, torch.Tensor]:
    return {f"task{i}": torch.tensor(value) for i, value in enumerate(values)}


def take(guard, optimizer, norm: float, found, step: int = 0, network: object = "net"):
    return guard.take(optimizer, torch.tensor(norm), [found], step=step, networks=[network])


@pytest.mark.parametrize("build", [adam, sgd])
@pytest.mark.parametrize(
    ("norm", "values"), [(math.nan, (1.0, 2.0)), (1.0, (math.nan, 2.0)), (1.0, (1.0, math.inf))]
)
def test_a_step_that_is_not_finite_leaves_no_trace(build, norm, values):
    gradients = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    straight, guarded = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizers = build([straight]), build([guarded])
    guard = StepGuard("search", max_skipped=3)
    for step, gradient in enumerate(gradients):
        if step == 2:
            guarded.grad = torch.full((5,), math.nan)
            assert take(guard, optimizers[1], norm, losses(*values))
        straight.grad, guarded.grad = gradient.clone(), gradient.clone()
        optimizers[0].step()
        assert not take(guard, optimizers[1], 1.0, losses(1.0, 2.0))
    assert torch.equal(straight, guarded)
    guard.read()
    assert guard.num_skipped == 1


@pytest.mark.parametrize(
    ("build", "plain"),
    [
        (adam, lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=1e-3)),
        (sgd, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-3, momentum=0.9)),
    ],
)
def test_fused_steps_are_those_of_the_plain_optimizer(build, plain):
    """Also where some weights have their first gradient later than others, and after a resume."""
    generator = torch.Generator().manual_seed(1)
    weights = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
    optimizers = [build(weights[0]), plain(weights[1])]
    for step in range(6):
        for index in (0, 1):
            gradient = torch.randn(3, generator=generator)
            for group in weights:
                group[index].grad = gradient.clone() if index == 0 or step % 2 else None
        take(StepGuard("search", max_skipped=0), optimizers[0], 1.0, losses(1.0))
        optimizers[1].step()
        if step == 2:
            # A checkpoint of the plain one, as older versions wrote it.
            resumed = build(weights[0])
            resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
            optimizers[0] = resumed
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["fused"]


def test_momentum_begins_with_zeros_where_the_first_step_of_a_late_group_is_skipped():
    late = nn.Parameter(torch.ones(3))
    optimizer = sgd([nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full((3,), math.nan)
    assert take(StepGuard("search", max_skipped=1), optimizer, math.nan, losses(1.0))
    assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.zeros(3))
    assert torch.equal(late, torch.ones(3))


def test_the_message_names_step_task_and_architecture():
    guard, optimizer = StepGuard("search", max_skipped=1), adam([nn.Parameter(torch.ones(1))])
    take(guard, optimizer, 1.0, losses(math.nan, 1.0), 3, lambda: pytest.fail("within bounds"))
    guard.read()
    take(guard, optimizer, 1.0, losses(1.0, 1.0), 4, lambda: pytest.fail("all is well"))
    take(guard, optimizer, math.inf, losses(1.0, math.inf), 7, lambda: "i3e6c32")
    with pytest.raises(RuntimeError) as error:
        guard.read()
    assert str(error.value) == (
        "search step 7: the loss of task1 is not finite, architecture i3e6c32; 2 steps were "
        "skipped, max_skipped is 1; lower the learning rate or check the labels"
    )


def test_a_gradient_may_be_bad_where_the_losses_are_not():
    guard, optimizer = StepGuard("retrain", max_skipped=0), adam([nn.Parameter(torch.ones(1))])
    take(guard, optimizer, math.nan, losses(1.0), 5)
    with pytest.raises(RuntimeError, match="retrain step 5: the gradient is not finite, archit"):
        guard.read()


def test_two_bad_optimizers_of_one_step_are_one_skipped_step():
    guard = StepGuard("search", max_skipped=5)
    for step in (1, 1, 2):
        take(guard, adam([nn.Parameter(torch.ones(1))]), math.nan, losses(1.0), step)
    guard.read()
    assert guard.num_skipped == 2


def test_what_is_not_finite_is_replaced_one_by_one():
    values = torch.tensor([1.0, math.nan, -math.inf])
    assert finite_or(values, torch.tensor([7.0, 8.0, 9.0])).tolist() == [1.0, 8.0, 9.0]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


def waits(step) -> int:
    with Waits() as found:
        step()
    return found.count


def test_no_step_reads_a_number_from_the_device(tiny):
    """Of the whole step but the draw by alpha, whose result says what to run."""
    search = tiny.search(steps=40, warmup_fraction=0.25, sandwich=True)
    assert waits(lambda: search.guard.read()) == 0
    for step in (0, 1, 21, 22):  # warm-up, then with alpha steps that are not logged
        found = waits(lambda step=step: search.take_step(step))
        assert found == 0, f"step {step}"
    one = torch.ones(())
    assert waits(lambda: float(one)) == 1
