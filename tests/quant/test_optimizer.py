"""csqcli.CSQ is a torch optimizer in every respect, and saving what it trained never disturbs it."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import csqcli
from csqcli import UserError
from csqcli.models.networks import digits_cnn
from csqcli.quant.optimizer import CSQ
from csqcli.quant.wrappers import unwrap

STEPS = 20
WEIGHTS = ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    return torch.rand(size, 1, 8, 8, generator=rng), torch.randint(0, 10, (size,), generator=rng)


def start(seed: int = 0, **settings: Any) -> tuple[nn.Module, CSQ]:
    torch.manual_seed(seed)
    model = digits_cnn()
    return model, CSQ(model, **{"target_bits": 2.5, "total_steps": STEPS, **settings})


def backward(model: nn.Module, step: int) -> Tensor:
    images, labels = batch(step)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: CSQ, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unwrap(model).state_dict().items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def save(model: Any, optimizer: CSQ, path: Path, **details: Any) -> dict[str, Any]:
    return csqcli.save(model, optimizer, path, **{"source": "csq:digits_cnn", "num_classes": 10, **details})


# groups


def test_the_groups_hold_every_parameter_of_the_model_once_and_the_weights_in_a_group_of_their_own() -> None:
    model, optimizer = start()
    names = dict(model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[-1]["params"]] == [id(names[name]) for name in WEIGHTS]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_the_base_optimizer_leaves_the_quantized_weights_alone() -> None:
    model, optimizer = start()
    train(model, optimizer, range(3))
    assert not any(layer.parameter in optimizer.state for layer in optimizer.method.layers)
    assert all(p in optimizer.state for p in optimizer.param_groups[0]["params"])


def test_zero_grad_reaches_all_parameters_and_sets_to_zero_when_asked() -> None:
    model, optimizer = start()
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_group_cannot_be_added() -> None:
    _, optimizer = start()
    with pytest.raises(UserError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert len(optimizer.param_groups) == 2


# steps


def test_a_closure_gives_the_gradients_and_its_loss_comes_back() -> None:
    model, optimizer = start()
    other, plain = start()

    def closure() -> Tensor:
        plain.zero_grad()
        return backward(other, 0)

    loss = plain.step(closure)
    train(model, optimizer, range(1))
    assert isinstance(loss, Tensor)
    assert loss.requires_grad
    assert_equal(values(model), values(other))


@pytest.mark.parametrize("total", [0, -3, 2.5, 20.0, True, "20", None])
def test_total_steps_is_a_whole_number_from_1(total: Any) -> None:
    with pytest.raises(UserError, match="total_steps must be a whole number of at least 1"):
        start(total_steps=total)


@pytest.mark.parametrize("target", [0, -1.0, 8.5, math.nan, math.inf])
def test_a_target_outside_the_planes_is_refused(target: float) -> None:
    with pytest.raises(UserError, match="target_bits must be above 0 and at most 8"):
        start(target_bits=target)


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_a_learning_rate_that_is_no_positive_number_is_refused(lr: float) -> None:
    with pytest.raises(UserError, match="lr must be a number above 0"):
        start(lr=lr)


@pytest.mark.parametrize("method", ["staged", "csq", "csq-uniform", "lsq"])
def test_steps_past_the_end_keep_the_delivered_weights_and_train_the_rest(method: str) -> None:
    model, optimizer = start(total_steps=2, method=method, target_bits=2)
    train(model, optimizer, range(1))
    backward(model, 1)
    optimizer.step()  # and its gradients stay
    before = values(model)
    with optimizer.hard() as layers:
        integers = [layer.integers.clone() for layer in layers]
    with pytest.warns(UserWarning, match=r"CSQ\.step: all 2 steps of total_steps are done; quantized weights stay"):
        optimizer.step()
    train(model, optimizer, range(2, 5))  # warned of once: another warning would be an error
    after = values(model)
    assert_equal({name: before[name] for name in WEIGHTS}, {name: after[name] for name in WEIGHTS})
    assert not torch.equal(before["fc.bias"], after["fc.bias"])
    with optimizer.hard() as layers:
        assert all(torch.equal(one, layer.integers) for one, layer in zip(integers, layers, strict=True))
    assert optimizer.step(lambda: backward(model, 5).item()) > 0
    again, resumed = start(total_steps=2, method=method, target_bits=2)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert_equal({name: before[name] for name in WEIGHTS}, {name: values(again)[name] for name in WEIGHTS})


def test_hooks_around_a_step_run_once_each() -> None:
    model, optimizer = start()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


def test_one_glob_to_exclude_may_stand_without_a_list() -> None:
    kept = [layer.name for layer in start(exclude="fc")[1].method.layers]
    assert kept == [layer.name for layer in start(exclude=["fc"])[1].method.layers] == WEIGHTS[:-1]
    found = csqcli.quantize(digits_cnn(), [batch(0)[0]], 3, exclude="conv*")
    assert list(found.planes) == ["fc.weight"]
    with pytest.raises(
        UserError, match=r"no weight to quantize; all 4 are excluded: see layers.exclude in the recipe, or the "
    ):
        start(exclude="*")
    with pytest.raises(UserError, match="no weight to quantize; it has no linear or convolution layer"):
        CSQ(nn.BatchNorm2d(3), 2, total_steps=2)


# methods


@pytest.mark.parametrize("method", ["staged", "csq", "csq-uniform", "ste", "lsq"])
def test_every_method_trains_resumes_and_is_saved_alike(method: str, tmp_path: Path) -> None:
    model, optimizer = start(method=method, target_bits=2)
    train(model, optimizer, range(8))
    twin, copied = copy.deepcopy((model, optimizer))
    other, resumed = start(seed=1, method=method, target_bits=2)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with optimizer.hard() as layers:
        assert torch.equal(model.fc.weight, layers[-1].weight())
    for network, going in ((model, optimizer), (twin, copied), (other, resumed)):
        train(network, going, range(8, STEPS))
    assert_equal(values(model), values(twin))
    assert_equal(values(model), values(other))
    report = save(model, optimizer, tmp_path / "m.safetensors")
    assert report["budget"]["mean_bits"] <= 2
    assert torch.equal(csqcli.load(tmp_path / "m.safetensors").fc.weight, model.fc.weight), "not hard at the end"
    assert [id(p) for p in optimizer.param_groups[-1]["params"]] == [
        id(dict(model.named_parameters())[n]) for n in WEIGHTS
    ]


def test_settings_reach_the_method_as_a_mapping_or_as_its_own_class() -> None:
    from csqcli.quant.method_settings import CSQSettings

    assert start(settings={"search_share": 0.5})[1].method.search_steps == STEPS // 2
    assert start(method="csq", settings=CSQSettings(beta_final=50.0))[1].method.beta(STEPS) == pytest.approx(50.0)
    epochs = start(method="csq", settings={"beta_schedule": "epoch"}, steps_per_epoch=5)[1].method
    assert [epochs.beta(step) for step in (0, 4)] == [1.0, 1.0]
    assert epochs.beta(5) > 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "auto"}, "method: `auto` chooses by where the weights come from"),
        ({"method": "float"}, "`float` quantizes nothing"),
        ({"method": "stagd"}, "method: no method `stagd`; did you mean `staged`"),
        ({"method": "ste", "target_bits": 2.5}, "`ste` gives every layer the same planes, not 2.5"),
        ({"settings": {"serch_share": 0.5}}, "settings of `staged`: serch_share: .*; did you mean `search_share`"),
        ({"settings": {"search_share": 2}}, "search_share: Input should be less than 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1"),
    ],
)
def test_methods_and_settings_that_do_not_exist_or_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(**options)


def test_settings_of_another_method_are_refused() -> None:
    from csqcli.quant.method_settings import CSQSettings

    with pytest.raises(UserError, match="CSQSettings are not those of the method `staged`"):
        start(settings=CSQSettings())


# weights loaded after the optimizer was built


def resume_at_the_start(model: nn.Module, optimizer: CSQ) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("method", ["staged", "csq", "lsq"])
@pytest.mark.parametrize("between", [lambda *_: None, resume_at_the_start])
def test_weights_loaded_after_the_optimizer_was_built_are_refused_at_the_first_step_and_stay(
    method: str, between: Callable[[nn.Module, CSQ], None]
) -> None:
    model, optimizer = start(method=method, target_bits=2)
    between(model, optimizer)
    torch.manual_seed(1)
    other = digits_cnn().state_dict()
    model.load_state_dict(other)
    backward(model, 0)
    said = "conv1.weight: other weights were loaded after CSQ was built, .*; load the weights first, then build CSQ"
    for act in (optimizer.step, optimizer.harden, optimizer.hard().__enter__):
        with pytest.raises(UserError, match=said):
            act()
    assert all(torch.equal(values(model)[name], other[name]) for name in WEIGHTS)
    assert optimizer.step_count == 0


def test_weights_loaded_into_a_copy_are_refused_too() -> None:
    torch.manual_seed(1)
    other = digits_cnn().state_dict()
    model = digits_cnn()
    model.load_state_dict(other)
    optimizer = CSQ(model, target_bits=2.5, total_steps=STEPS)
    twin, copied = copy.deepcopy((model, optimizer))
    twin.load_state_dict(other)  # as often written to as the original
    backward(twin, 0)
    with pytest.raises(UserError, match="load the weights first"):
        copied.step()
    train(model, optimizer, range(1))


def broadcast(model: nn.Module) -> None:
    nn.parallel.DistributedDataParallel(model)
    model.load_state_dict(values(model))


def swap(model: nn.Module) -> None:
    own = values(model)
    torch.manual_seed(1)
    model.load_state_dict(digits_cnn().state_dict())
    model.load_state_dict(own)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1).sub_(1)  # in floats not what it was


@pytest.mark.parametrize("touch", [broadcast, swap, perturb])
@pytest.mark.parametrize("method", ["staged", "csq", "lsq"])
def test_equal_values_written_before_the_first_step_change_nothing(
    touch: Callable[[nn.Module], None], method: str, process_group: None
) -> None:
    model, optimizer = start(method=method, target_bits=2)
    other, plain = start(method=method, target_bits=2)
    touch(model)
    other.load_state_dict({**other.state_dict(), **{n: v for n, v in values(model).items() if n not in WEIGHTS}})
    train(model, optimizer, range(1))
    train(other, plain, range(1))
    for name, value in values(other).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-3, atol=1e-5)


def test_weights_that_nobody_wrote_to_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = start()
    written: list[int] = []
    materialise = optimizer.method.materialise
    monkeypatch.setattr(optimizer.method, "materialise", lambda step: written.append(step) or materialise(step))
    train(model, optimizer, range(2))
    assert written == [1, 2]


@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_run_goes_on_whichever_of_its_two_states_is_loaded_first(stop: int, model_first: bool) -> None:
    model, optimizer = start()
    train(model, optimizer, range(stop))
    network, own = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(stop, STEPS))
    other, resumed = start(seed=1)
    if model_first:
        other.load_state_dict(network)
    resumed.load_state_dict(own)
    if not model_first:
        other.load_state_dict(network)
    train(other, resumed, range(stop, STEPS))
    assert_equal(values(model), values(other))


# copies and state


def test_a_copy_made_together_with_its_model_trains_on_alike_and_apart() -> None:
    model, optimizer = start()
    train(model, optimizer, range(4))
    twin, copied = copy.deepcopy((model, optimizer))
    assert [id(p) for p in copied.param_groups[-1]["params"]] == [id(layer.parameter) for layer in copied.method.layers]
    assert {id(p) for group in copied.param_groups for p in group["params"]} == set(map(id, twin.parameters()))
    frozen = values(model)
    train(twin, copied, range(4, STEPS))
    assert_equal(values(model), frozen)
    train(model, optimizer, range(4, STEPS))
    assert_equal(values(model), values(twin))


@pytest.mark.parametrize("stop", [1, 7, 15])
def test_a_run_that_goes_on_from_its_saved_state_ends_in_the_same_bits(stop: int) -> None:
    """1: soft masks; 7: planes fixed, weights soft; 15: hard."""
    model, optimizer = start()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def go_on(model: nn.Module, optimizer: CSQ, scheduler: Any, steps: range) -> None:
        for step in steps:
            train(model, optimizer, range(step, step + 1))
            scheduler.step()

    go_on(model, optimizer, scheduler, range(stop))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    go_on(model, optimizer, scheduler, range(stop, STEPS))

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other, resumed = start(seed=1)
    again = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, STEPS)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    again.load_state_dict(state[2])
    go_on(other, resumed, again, range(stop, STEPS))
    assert_equal(values(model), values(other))


@pytest.mark.parametrize("stop", [1, 7])
def test_an_optimizer_can_be_taken_back_to_an_earlier_state(stop: int) -> None:
    """Whatever it has done since: planes were fixed, or it was hardened."""
    model, optimizer = start()
    train(model, optimizer, range(stop))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(stop, STEPS))
    optimizer.harden()
    ended = values(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(stop, STEPS))
    optimizer.harden()
    assert_equal(values(model), ended)


def test_the_state_has_the_form_of_any_optimizer_s() -> None:
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "csq"}
    assert [len(group["params"]) for group in state["param_groups"]] == [
        len(group["params"]) for group in optimizer.param_groups
    ]


def test_a_foreign_state_and_one_of_another_length_are_refused() -> None:
    model, optimizer = start()
    with pytest.raises(UserError, match="is not the state of a CSQ optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(UserError, match="the state is that of a run with total_steps 9, not 20"):
        optimizer.load_state_dict(start(total_steps=9)[1].state_dict())
    with pytest.raises(UserError, match=r"the state is that of a run with target_bits 1\.5, not 2\.5"):
        optimizer.load_state_dict(start(target_bits=1.5)[1].state_dict())
    other = "csq" if optimizer.method_name == "staged" else "staged"
    with pytest.raises(UserError, match=f"the state is that of a run with method_name '{other}', not "):
        optimizer.load_state_dict(start(method=other)[1].state_dict())
    with pytest.raises(
        UserError, match="the state is that of a run with other layers; build CSQ as at the first start"
    ):
        optimizer.load_state_dict(start(exclude=["fc"])[1].state_dict())
    state = optimizer.state_dict()
    for name in ("target_bits", "method_name", "layers"):
        del state["csq"][name]
    optimizer.load_state_dict(state)  # of csq 0.2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((nn.Linear(2, 2).parameters(), 3), "must be a torch.nn.Module, not a generator; give the model itself"),
        ((nn.Linear(2, 2), "3b"), "target_bits must be above 0 and at most 8, not '3b'"),
    ],
)
def test_what_is_no_model_and_no_target_is_one_line(given: tuple[Any, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CSQ(*given, total_steps=4)


def test_loading_a_state_puts_its_weights_into_the_model() -> None:
    model, optimizer = start()
    train(model, optimizer, range(5))
    other, resumed = start(seed=1)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(values(model)[name], values(other)[name]) for name in WEIGHTS)


# what people put around an optimizer


def test_a_gradient_scaler_unscales_the_weights_gradients_too() -> None:
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    images, labels = batch(0)
    scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
    scaler.unscale_(optimizer)
    other, _ = start()
    backward(other, 0)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_scaler_skips_the_step_when_a_weight_s_gradient_is_infinite() -> None:
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    images, labels = batch(0)
    scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
    optimizer.method.layers[1].parameter.grad[0, 0, 0, 0] = math.inf
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.step_count == 0
    assert scaler.get_scale() == 8.0
    assert_equal(before, {name: p.detach() for name, p in model.named_parameters()})


def test_a_run_under_a_gradient_scaler_ends_hard_and_within_the_budget(tmp_path: Path) -> None:
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(STEPS):
        images, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert save(model, optimizer, tmp_path / "m.safetensors")["budget"]["mean_bits"] <= 2.5


def test_clipping_over_the_groups_clips_what_clipping_over_the_model_clips() -> None:
    model, optimizer = start()
    backward(model, 0)
    grouped = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e-3)
    other, _ = start()
    backward(other, 0)
    assert torch.equal(grouped, nn.utils.clip_grad_norm_(other.parameters(), 1e-3))
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(total, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_one_cycle_drives_both_groups_and_the_latents_follow_its_own_peak() -> None:
    model, optimizer = start(lr=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.2, 0.4], total_steps=STEPS)
    shares = []
    for step in range(STEPS):
        shares.append(optimizer._rate()[1])
        train(model, optimizer, range(step, step + 1))
        if step + 1 < STEPS:
            scheduler.step()
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.2, 0.4]
    assert shares[0] == pytest.approx(1 / 25)  # OneCycleLR's div_factor
    assert max(shares) == pytest.approx(1.0, abs=0.05)
    assert shares[-1] < 1e-3
    assert all(map(torch.isfinite, map(torch.sum, values(model).values())))


def test_a_scheduler_of_several_groups_may_hold_the_latents_still() -> None:
    model, optimizer = start()
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.0])
    before = values(model)
    latents = [latent.clone() for latent in optimizer.method.latents]
    train(model, optimizer, range(1))
    assert all(map(torch.equal, latents, optimizer.method.latents))
    assert not torch.equal(values(model)["fc.bias"], before["fc.bias"])


def test_a_rate_raised_above_the_peak_moves_the_latents_no_faster() -> None:
    model, optimizer = start()
    other, faster = start()
    faster.param_groups[-1]["lr"] = 5.0
    train(model, optimizer, range(2))
    train(other, faster, range(2))
    assert_equal(values(model), values(other))


def test_accumulated_gradients_are_one_step() -> None:
    model, optimizer = start()
    other, whole = start()
    for network in (model, other):
        network.eval()  # BatchNorm would see parts
    images, labels = batch(0)
    nn.functional.cross_entropy(other(images), labels).backward()
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        (nn.functional.cross_entropy(model(images[rows]), labels[rows]) / 4).backward()
    optimizer.step()
    whole.step()
    assert optimizer.step_count == 1
    for name, value in values(other).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-3, atol=1e-3)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap", [compiled, parallel, lambda model: compiled(parallel(model)), lambda model: parallel(compiled(model))]
)
def test_wrapped_models_train_and_are_saved_under_the_network_s_own_names(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path, process_group: None
) -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        wrapped = wrap(model)
        optimizer = CSQ(wrapped, target_bits=2.5, total_steps=3)
        train(wrapped, optimizer, range(3))
    report = save(wrapped, optimizer, tmp_path / "m.safetensors")
    assert [layer["name"] for layer in report["layers"]] == WEIGHTS
    plain, reference = start(total_steps=3)
    train(plain, reference, range(3))
    loaded = csqcli.load(tmp_path / "m.safetensors").state_dict()
    for name in WEIGHTS:
        torch.testing.assert_close(loaded[name], values(plain)[name])


@pytest.mark.parametrize("wrap", [ModelEmaV3, AveragedModel])
def test_an_average_of_weights_is_saved_at_the_optimizer_s_planes_and_scales(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, optimizer = start()
    average = wrap(model, decay=0.5) if wrap is ModelEmaV3 else wrap(model)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        if wrap is ModelEmaV3:
            average.update(model, step=step)
        else:
            average.update_parameters(model)
    before = values(average)
    report = save(average, optimizer, tmp_path / "average.safetensors")
    trained = save(model, optimizer, tmp_path / "trained.safetensors")
    assert_equal(values(average), before)
    assert [(layer["mask"], layer["scale"]) for layer in report["layers"]] == [
        (layer["mask"], layer["scale"]) for layer in trained["layers"]
    ]
    assert report["payload_sha256"] != trained["payload_sha256"]
    loaded = csqcli.load(tmp_path / "average.safetensors").state_dict()
    assert torch.equal(loaded["fc.bias"], before["fc.bias"])
    for layer, entry in zip(optimizer.hard_layers(), report["layers"], strict=True):
        scale = layer.scale.view(-1, *[1] * (layer.integers.dim() - 1))
        top = (2 ** entry["bits"] - 1) * scale
        inside = before[layer.name].abs() <= top
        gap = (loaded[layer.name] - before[layer.name]).abs()
        assert ((gap <= scale / 2 * 1.001) | ~inside).all(), "not the nearest level"


# validating and saving on the way


def test_the_hard_model_can_be_tried_and_saved_at_any_step_without_changing_the_run(tmp_path: Path) -> None:
    model, optimizer = start()
    plain, undisturbed = start()
    model.conv1.eval()  # modes that differ from module to module come back
    modes = [module.training for module in model.modules()]
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        train(plain, undisturbed, range(step, step + 1))
        if step % 4 == 1:
            random = torch.get_rng_state()
            with optimizer.hard() as layers:
                assert torch.equal(model.conv1.weight, layers[0].weight())
            save(model, optimizer, tmp_path / "m.safetensors", loader=[batch(s) for s in range(2)])
            assert [module.training for module in model.modules()] == modes
            assert torch.equal(random, torch.get_rng_state())
            loaded = csqcli.load(tmp_path / "m.safetensors")
            assert torch.equal(loaded.conv1.weight, layers[0].weight())
    assert_equal(values(model), values(plain))


def test_the_planes_of_a_model_saved_on_the_way_keep_the_budget(tmp_path: Path) -> None:
    model, optimizer = start(total_steps=200)
    train(model, optimizer, range(2))  # masks are soft
    assert save(model, optimizer, tmp_path / "m.safetensors")["budget"]["mean_bits"] <= 2.5


def test_a_run_of_one_step_is_hard_at_its_end(tmp_path: Path) -> None:
    model, optimizer = start(total_steps=1)
    train(model, optimizer, range(1))
    save(model, optimizer, tmp_path / "m.safetensors")
    assert torch.equal(csqcli.load(tmp_path / "m.safetensors").fc.weight, model.fc.weight)
