"""The Triton kernels of deformable attention, in Triton's interpreter and on a GPU, equal the plain form."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or sys.platform != "linux",
    reason="Triton comes with torch's CUDA build for Linux",
)
ROOT = Path(__file__).parent.parent

CASES = {  # B, N, M, D, P, shapes, spread of the locations around the middle, value's type
    "a layer of the model": (1, 84, 2, 32, 4, [(2, 2), (4, 4), (8, 8)], 1.0, "float32"),
    "odd sizes": (2, 35, 2, 12, 3, [(3, 5), (4, 2), (1, 6)], 1.2, "float32"),
    "one of everything": (1, 1, 1, 1, 1, [(1, 1)], 1.0, "float32"),
    "mostly outside": (1, 33, 2, 16, 2, [(3, 5), (4, 2)], 6.0, "float32"),
    "half precision": (1, 40, 2, 32, 4, [(3, 5), (4, 2), (1, 6)], 1.1, "bfloat16"),
}
# In a process of its own: the interpreter is chosen when Triton is imported.
SCRIPT = """
import json, sys, traceback
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import deform_attn_triton, model

def compare(B, N, M, D, P, shapes, spread, dtype):
    torch.manual_seed(0)
    L, S = len(shapes), sum(H * W for H, W in shapes)
    value = torch.randn(B, S, M, D, dtype=getattr(torch, dtype))
    locations = 0.5 + spread * (torch.rand(B, N, M, L, P, 2) - 0.5)
    weights = torch.randn(B, N, L * P, M).softmax(2).transpose(2, 3).unflatten(3, (L, P))  # as in the model
    grad = torch.randn(B, N, M * D)
    results = []
    for attention, on in ((deform_attn_triton.ms_deform_attn, device), (model.ms_deform_attn, "cpu")):
        inputs = [tensor.to(on, copy=True).requires_grad_() for tensor in (value, locations, weights)]
        output = attention(inputs[0], shapes, *inputs[1:])
        output.backward(grad.to(output))
        results.append([output.cpu(), *(tensor.grad.cpu() for tensor in inputs)])
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name, ours, plain in zip(("output", "value", "locations", "weights"), *results):
        error = (ours.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-3)
        assert error < tolerance, (name, error)
    assert results[0][0].dtype == value.dtype and results[0][1].dtype == value.dtype
    sizes = [side for shape in shapes for side in shape]
    inputs = [tensor.detach() for tensor in (value, locations, weights)]
    if N == 1:  # slow
        arguments = [tensor.to(device).requires_grad_() for tensor in inputs]
        torch.library.opcheck(deform_attn_triton.ms_deform_attn_op, (*arguments, sizes))
    inputs = [tensor.to(device) for tensor in inputs]
    backward, grad = deform_attn_triton.ms_deform_attn_backward_op, grad.to(inputs[0])
    found = backward(grad, *inputs, sizes)
    with FakeTensorMode() as fake:  # torch.compile relies on the layout, which opcheck does not check
        expected = backward(*map(fake.from_tensor, (grad, *inputs)), sizes)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    try:
        deform_attn_triton.ms_deform_attn(inputs[0], [*shapes, (1, 1)], *inputs[1:])
        raise AssertionError("shapes that do not fit the value were accepted")
    except ValueError as error:
        assert "positions" in str(error)
    locations = locations.detach().clone()
    locations[0, 0] = float("nan")
    value, locations, weights = (tensor.to(device) for tensor in (value, locations, weights))
    assert (deform_attn_triton.ms_deform_attn(value, shapes, locations, weights)[0, 0] == 0).all()

verdicts, device = {}, sys.argv[2]
for name, case in json.loads(sys.argv[1]).items():
    try:
        compare(*case)
        verdicts[name] = "same"
    except Exception:
        verdicts[name] = traceback.format_exc()
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def verdicts(request):
    interpreted = {"TRITON_INTERPRET": "1"} if request.param == "cpu" else {}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | interpreted
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES), request.param]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_the_plain_operator(case, verdicts):
    assert verdicts[case] == "same"


COMPILE = """
import sys
import deform_attn_triton
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

constants = dict(M=8, D=32, L=3, P=4, LANES=32, BLOCK=deform_attn_triton.BLOCK)
types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(("S", "N"), "i32")
types["levels"] = "*i32"
types |= dict.fromkeys(("value", "output", "grad_output"), sys.argv[1])
for kernel in (deform_attn_triton._forward_kernel, deform_attn_triton._backward_kernel):
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    assert compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="Triton's assembler for GPUs is in its x86-64 build"
)
@pytest.mark.parametrize("value", ["*fp32", "*bf16"])
def test_the_kernels_compile_for_a_gpu(value, tmp_path):
    """The interpreter takes more of Python than the compiler does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, value]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("compiled\n"), result.stderr[-2000:]
