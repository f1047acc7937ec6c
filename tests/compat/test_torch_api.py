"""What the package uses of torch without a promise. A test that fails names what a new release took away or changed."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from peft_bsr.compat import torch_api


def test_storage_key():
    tensor, other = torch.zeros(4), torch.zeros(4)
    assert torch_api.storage_key(tensor.untyped_storage()) == torch_api.storage_key(tensor[1:].untyped_storage())
    assert torch_api.storage_key(tensor.untyped_storage()) != torch_api.storage_key(other.untyped_storage())


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_copy_with_hooks(kind):
    """Hooks with keywords too, from before and after, on a module inside; removed from one they are gone from both."""
    base, calls, lock = nn.Sequential(nn.Linear(2, 2)), [], threading.Lock()  # a lock cannot be copied
    settings = {"with_kwargs": True, "always_call": True} if kind == "forward_hook" else {}

    def put():
        return getattr(base[0], f"register_{kind}")(lambda *_: calls.append(lock), **settings)

    handles = [put()]
    module = torch_api.copy_with_hooks(base)
    handles.append(put())
    inputs = torch.ones(1, 2, requires_grad=True)
    for one in (module, base):
        one(inputs).sum().backward()
    assert len(calls) == 4 and module[0].weight is not base[0].weight
    for handle in handles:
        handle.remove()
    module(inputs).sum().backward()
    assert len(calls) == 4


def test_storage_weak_ref():
    tensor = torch.zeros(4)
    reference = torch_api.StorageWeakRef(tensor.untyped_storage())
    assert reference == torch_api.StorageWeakRef(tensor[1:].untyped_storage()) and not reference.expired()
    assert len({reference, torch_api.StorageWeakRef(tensor.untyped_storage())}) == 1
    del tensor
    gc.collect()
    assert reference.expired()


def test_version_of():
    tensor = torch.zeros(4)
    before = torch_api.version_of(tensor)
    tensor.add_(1)
    assert torch_api.version_of(tensor) == before + 1


def test_parameters_and_modules():
    module = nn.Sequential(nn.Linear(2, 2))
    assert getattr(module, torch_api.MODULES) == {"0": module[0]} and getattr(module, torch_api.PARAMETERS) == {}
    assert set(getattr(module[0], torch_api.PARAMETERS)) == {"weight", "bias"}
    new = nn.Parameter(torch.zeros(2, 2))
    getattr(module[0], torch_api.PARAMETERS)["weight"] = new
    assert module[0].weight is new
    held = getattr(module, torch_api.MODULES)
    module.append(nn.ReLU())
    assert list(held) == ["0", "1"]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hook_dictionaries(kind):
    module, register = nn.Linear(2, 2), f"register_{kind}"
    held = torch_api.hook_dictionaries(module)
    assert len(held) == 4 and not any(held)
    getattr(module, register)(print)
    ((number, hook),) = [item for hooks in held for item in hooks.items()]
    assert hook is print
    handle = getattr(module, register)(print)
    assert sorted(n for hooks in held for n in hooks) == [number, number + 1], "numbers are given once"
    handle.remove()
    assert torch_api.has_forward_hooks(module) == ("forward" in kind)


def test_unsaved_buffers():
    module = nn.BatchNorm1d(2)
    module.register_buffer("other", torch.zeros(1), persistent=False)
    assert torch_api.unsaved_buffers(module) == {"other"}


def test_remove_hooks():
    class Owner:
        calls = 0

        def see(self, *_, **__):
            self.calls += 1

    module, owner, other = nn.Linear(2, 2), Owner(), Owner()
    for one in (owner, other):
        module.register_forward_pre_hook(one.see, with_kwargs=True)
        module.register_forward_hook(one.see, with_kwargs=True, always_call=True)
    torch_api.remove_hooks(module, owner)
    module(torch.zeros(1, 2))
    assert (owner.calls, other.calls) == (0, 2)
    left = [hooks for name, hooks in vars(module).items() if name.startswith("_forward_") and hooks]
    assert all(len(hooks) == 1 for hooks in left) and len(left) == 5, "torch keeps something more of each hook"


def test_gradient_hooks():
    parameter = nn.Parameter(torch.zeros(1))
    assert torch_api.gradient_hooks(parameter) == {}
    seen = []
    parameter.register_post_accumulate_grad_hook(seen.append)
    held = torch_api.gradient_hooks(parameter)
    before = dict(held)
    held.clear()
    parameter.sum().backward()
    held.update(before)
    parameter.sum().backward()
    assert len(seen) == 1


def test_step_hook_names():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    optimizer.register_step_pre_hook(print)
    optimizer.register_step_post_hook(print)
    held = {name: getattr(optimizer, name) for name in torch_api.step_hook_names(optimizer)}
    assert [len(hooks) for hooks in held.values()] == [1, 1], held


def test_leave_to_ddp():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch_api.leave_to_ddp(model, ["weight"])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(other, ["weight"])
    assert {name: vars(model)[name] for name in vars(other) if name not in vars(nn.Linear(2, 2))} == {
        "_ddp_params_and_buffers_to_ignore": ["weight"]
    }
    torch_api.leave_to_ddp(model, [])
    assert set(vars(model)) == set(vars(nn.Linear(2, 2)))


def test_no_memory():
    with torch_api.no_memory() as mode:
        tensor = torch.empty(2**50, device="cuda")
    with mode:
        assert (tensor + 1).device.type == "cuda" and (tensor + 1).shape == (2**50,)
        assert torch.zeros(2, device="cuda") + torch.ones(2, device="cuda") is not None
        with pytest.raises(torch_api.NeedsValues):
            torch.empty(1).item()


def test_dispatch_mode_sees_each_operator():
    seen = []

    class Mode(torch_api.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_is_traceable_wrapper_subclass():
    assert not torch_api.is_traceable_wrapper_subclass(torch.zeros(1))
    jagged = torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged)
    assert torch_api.is_traceable_wrapper_subclass(jagged)
    assert all(hasattr(jagged, name) for name in jagged.__tensor_flatten__()[0])


def test_trees():
    tree = {"a": (torch.zeros(1), [2]), "b": None}
    assert [leaf for leaf in torch_api.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] == [tree["a"][0]]
    assert torch_api.tree_map_only(int, lambda number: number + 1, tree)["a"][1] == [3]


def test_saved_in_node():
    inputs, weights = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    product = inputs @ weights
    saved = list(torch_api.saved_in_node(product.grad_fn))
    assert any(tensor.data_ptr() == inputs.data_ptr() for tensor in saved)


def test_recompile_limit():
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    with torch_api.recompile_limit(12345):
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (12345, 12345)
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before


def test_activation_memory_budget():
    assert torch_api.activation_memory_budget() == 1
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        assert torch_api.activation_memory_budget() == 0.5


def test_softmax_backward():
    logits, gradient = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 5).double()
    weights = logits.softmax(-1)
    weights.backward(gradient)
    found = torch_api.softmax_backward(gradient, weights.detach(), -1, weights.dtype)
    assert torch.allclose(found, logits.grad, atol=1e-14)


def test_cpu_attention():
    """The operators that run on the CPU, for which torch's own counter has no formula."""
    seen = []

    class Mode(torch_api.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    with Mode():
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    own = {torch_api.CPU_ATTENTION: lambda *_: 1, torch_api.CPU_ATTENTION_BACKWARD: lambda *_: 2}
    found = [formula for function in seen if (formula := torch_api.flop_formula(function, own)) in own.values()]
    assert found == list(own.values())


def test_flop_formula_and_takes_tensors():
    formula = torch_api.flop_formula(torch.ops.aten.mm.default, {})
    assert formula(torch.zeros(2, 3), torch.zeros(3, 5), out_val=torch.zeros(2, 5)) == 60
    assert torch_api.flop_formula(torch.ops.aten.relu.default, {}) is None
    shapes = []
    own = torch_api.takes_tensors(lambda *args, **_: shapes.append(type(args[0])) or 7)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.relu: own}) as counter:
        torch.relu(torch.zeros(2))
    assert counter.get_total_flops() == 7 and shapes == [torch.Tensor]


def test_sdpa_flop_counts():
    shape = (1, 2, 5, 4)
    assert torch_api.sdpa_flop_count(shape, shape, shape) == 2 * 2 * 2 * 5 * 5 * 4
    assert torch_api.sdpa_backward_flop_count(shape, shape, shape, shape) == 2 * 5 * 2 * 5 * 5 * 4


def test_onnx_registration_logger():
    pytest.importorskip("onnxscript")
    import torch.onnx._internal.exporter._registration as registration

    assert registration.logger is logging.getLogger(torch_api.ONNX_REGISTRATION_LOGGER)
