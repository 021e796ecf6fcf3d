"""fusewright.testing finds the faults that it is there to find: each check is given one."""

import json
import math

import pytest
import torch

from fusewright import functional, testing
from fusewright.testing import baseline, budgets, golden, layouts, verify
from fusewright_kernels import dispatch

FLOAT32_UNIT = 2.0**-24


def test_error_counts_units_of_the_result():
    oracle = torch.full((1000,), 3.0, dtype=torch.float64)
    for dtype, unit in ((torch.float32, FLOAT32_UNIT), (torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)):
        spacing = 2.0 * torch.finfo(dtype).eps  # of numbers in [2, 4)
        actual = (oracle + spacing).to(dtype)
        assert testing.error_in_u(actual, oracle) == pytest.approx(spacing / 3.0 / unit)


def test_error_is_a_root_mean_square_and_the_element_error_a_maximum():
    oracle = torch.ones(100, dtype=torch.float64)
    actual = torch.ones(100)
    actual[7] += 8 * FLOAT32_UNIT
    assert testing.error_in_u(actual, oracle) == pytest.approx(0.8)
    assert testing.max_element_error_in_u(actual, oracle) == pytest.approx(8.0)


def test_a_large_element_is_measured_by_its_own_size():
    oracle = torch.full((10_000,), 1e-6, dtype=torch.float64)
    oracle[3] = 1.0
    actual = oracle.float()
    actual[3] = 1.0 + 2 * FLOAT32_UNIT
    assert testing.max_element_error_in_u(actual, oracle) == pytest.approx(2.0)


def test_magnitude_stands_for_the_terms_of_a_cancelled_sum():
    oracle = torch.zeros(10, dtype=torch.float64)
    actual = torch.full((10,), 4 * FLOAT32_UNIT)
    assert testing.error_in_u(actual, oracle) == math.inf
    assert testing.error_in_u(actual, oracle, magnitude=1.0) == pytest.approx(4.0)
    assert testing.magnitude_in(1.0, torch.float32, torch.bfloat16) == 2.0**-15


@pytest.mark.parametrize(
    "actual, oracle, agree",
    [
        ([1.0, math.nan], [1.0, math.nan], True),
        ([1.0, math.inf, -math.inf], [1.0, math.inf, -math.inf], True),
        ([1.0, math.inf], [1.0, -math.inf], False),
        ([1.0, math.nan], [1.0, math.inf], False),
        ([1.0, math.nan], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, math.nan], False),
        ([math.inf, 2.0], [1.0, 2.0], False),
    ],
)
def test_non_finite_elements_must_agree(actual, oracle, agree):
    error = testing.error_in_u(torch.tensor(actual), torch.tensor(oracle, dtype=torch.float64))
    assert error == (0.0 if agree else math.inf)


def test_error_of_nothing_is_zero_and_bad_arguments_are_named():
    empty = torch.empty(0, 3)
    assert testing.error_in_u(empty, empty.double()) == testing.max_element_error_in_u(empty, empty.double()) == 0.0
    with pytest.raises(TypeError, match=r"oracle\.dtype is torch\.float32"):
        testing.error_in_u(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"actual\.shape is \(3,\)"):
        testing.error_in_u(torch.ones(3), torch.ones(4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"dtype is torch\.int64"):
        testing.error_in_u(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64))


def test_an_error_of_three_units_fails_a_budget_of_two():
    oracle = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = oracle.bfloat16()
    assert 0.5 < testing.assert_accurate(rounded, oracle).error < 1.0
    with pytest.raises(AssertionError, match="above the budget of 2u"):
        testing.assert_accurate((oracle * (1 + 3 * 2.0**-9)).bfloat16(), oracle)


def test_one_wrong_element_among_many_fails():
    oracle = torch.ones(10**6, dtype=torch.float64)
    actual = oracle.float()
    actual[5] += 400 * 16 * FLOAT32_UNIT
    with pytest.raises(AssertionError, match="an element is wrong"):
        testing.assert_accurate(actual, oracle)


def test_twice_the_error_of_plain_pytorch_fails_within_the_budget():
    oracle = torch.ones(100, dtype=torch.float64)
    plain, actual = oracle.float() + 4 * FLOAT32_UNIT, oracle.float() + 10 * FLOAT32_UNIT
    assert testing.judge(actual, oracle).passed
    judgement = testing.judge(actual, oracle, plain=plain)
    assert [failure for failure in judgement.failures if "plain PyTorch" in failure]


def test_budgets_grow_with_logits_and_under_the_interpreter():
    assert testing.budget_of(torch.float32).for_logits(8.0) == budgets.Budget(16.0, 24.0)
    assert testing.budget_of(torch.bfloat16).for_logits(64.0) == budgets.Budget(8.0, 20.0)
    assert testing.budget_of(torch.bfloat16, interpreted=True).forward == 4.0
    assert testing.budget_of(torch.float16, interpreted=True).forward == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("place", [-1, 6, 12])
def test_a_write_beside_a_tensor_is_found(dtype, place):
    guard = testing.GuardedTensor((2, 6), (7, 1), dtype)  # rows 0 to 5 and 7 to 12
    guard.tensor.fill_(3)
    guard.check()
    flat = guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + place)
    flat.fill_(5)
    if place == 12:
        guard.check()
    else:
        with pytest.raises(AssertionError, match=f"written, at offsets {place}"):
            guard.check()


def test_a_read_beside_a_tensor_is_found():
    values = torch.randn(4, 6)
    guard = testing.guarded(values)
    assert torch.equal(guard.tensor, values)
    assert guard.tensor.data_ptr() % 64 == torch.empty(1024).data_ptr() % 64
    testing.assert_no_nan(guard.tensor.sum())
    one_too_many = guard.tensor.as_strided((4, 7), (6, 1))
    with pytest.raises(AssertionError, match="holds 1 NaN"):
        testing.assert_no_nan(one_too_many.sum())


def test_guarded_buffers_of_odd_shapes():
    assert testing.GuardedTensor((0, 5)).tensor.shape == (0, 5)
    assert testing.GuardedTensor(()).tensor.shape == ()
    assert testing.guarded(torch.arange(3.0).expand(4, 3)).tensor.stride() == (0, 1)
    assert testing.guarded(torch.ones(3), offset=1).tensor.data_ptr() % 16 == 4
    with pytest.raises(ValueError, match="stride is"):
        testing.GuardedTensor((2, 3), (3, -1))


@pytest.fixture
def faulty_ops():
    """Ops with one fault each, as a compiled kernel could have it."""
    library = torch.library.Library("fusewright_faulty", "DEF")

    def sound(input):
        return torch.empty_like(input).copy_(input)

    def past_the_end(input):
        output = torch.empty_like(input).copy_(input)
        output.as_strided((1,), (1,), output.storage_offset() + output.numel()).fill_(1.0)
        return output

    def unwritten(input):
        output = torch.empty_like(input)
        output[1:] = input[1:]
        return output

    for kernel in (sound, past_the_end, unwritten):
        library.define(f"{kernel.__name__}(Tensor input) -> Tensor")
        library.impl(kernel.__name__, kernel, "CPU")
    yield torch.ops.fusewright_faulty
    library._destroy()


def test_a_kernel_that_writes_past_its_own_buffer_is_found(faulty_ops):
    input = torch.randn(5, 7)
    with testing.guarded_allocations("fusewright_faulty") as guard:
        output = faulty_ops.sound(input)
    assert torch.equal(output, input)
    assert [op for op, _ in guard.buffers] == ["fusewright_faulty.sound.default"]
    with (
        pytest.raises(AssertionError, match=r"allocated by fusewright_faulty\.past_the_end.*offsets 35"),
        testing.guarded_allocations("fusewright_faulty"),
    ):
        faulty_ops.past_the_end(input)


def test_a_kernel_that_leaves_an_element_unwritten_is_found(faulty_ops):
    input = torch.randn(5, 7)
    with testing.poisoned_allocations():
        testing.assert_no_nan(faulty_ops.sound(input))
        output = faulty_ops.unwritten(input)
    with pytest.raises(AssertionError, match="holds 7 NaN"):
        testing.assert_no_nan(output)
    with testing.guarded_allocations("fusewright_faulty"):
        output = faulty_ops.unwritten(input)
    with pytest.raises(AssertionError, match="holds 7 NaN"):
        testing.assert_no_nan(output)


def test_poisoning_is_undone():
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with pytest.raises(KeyError), testing.poisoned_allocations():
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
            raise KeyError
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 7), (6,), (0, 3), ()])
def test_layout_variants_have_equal_values(shape):
    values = torch.randn(shape)
    variants = dict(testing.layout_variants(values))
    assert all(testing.bits_equal(variant, values) for variant in variants.values())
    if len(shape) == 3:
        assert {"contiguous", "transposed", "gapped", "every_second", "misaligned"} <= variants.keys()
        assert variants["transposed"].stride() == (1, 3, 12)
        assert variants["misaligned"].data_ptr() % 16 == 4
        assert variants["every_second"].stride(-1) == 2


def test_expanded_finds_every_constant_dimension():
    values = torch.randn(3, 1, 5).expand(3, 4, 5).clone()
    assert layouts.expanded(values).stride() == (5, 0, 1)
    assert torch.equal(layouts.expanded(values), values)


def test_a_batch_variant_kernel_is_found():
    def sum_split_by_batch(input):
        # Two partial sums for small batches, one for large: the same values, rounded in another order.
        if input.shape[0] > 2:
            return input.sum(-1)
        return input[:, ::2].sum(-1) + input[:, 1::2].sum(-1)

    inputs = [torch.randn(9, 1001, generator=torch.Generator().manual_seed(1))]
    testing.assert_batch_invariant(lambda x: x * 2.0, inputs)
    with pytest.raises(AssertionError, match=r"rows \d to \d alone: result 0 has changed"):
        testing.assert_batch_invariant(sum_split_by_batch, inputs)


def test_results_that_depend_on_run_threads_or_row_order_are_found():
    calls = iter(range(100))
    ones = [torch.ones(4, 4)]
    with pytest.raises(AssertionError, match="run 2: result 0"):
        testing.assert_repeatable(lambda x: x * next(calls), ones)
    before = torch.get_num_threads()
    with pytest.raises(AssertionError, match="2 threads against 1"):
        testing.assert_thread_count_invariant(lambda x: x * torch.get_num_threads(), ones)
    assert torch.get_num_threads() == before
    with pytest.raises(AssertionError, match="reverse order"):
        testing.assert_row_permutation_equivariant(lambda x: x.cumsum(0), ones)
    with pytest.raises(AssertionError, match="2 results, expected 1"):
        testing.assert_repeatable(lambda x: [x] * (1 + (next(calls) % 2)), ones, runs=2)


def test_metamorphic_checks_find_a_missing_mean_and_a_wrong_gradient():
    input = torch.randint(-64, 64, (6, 40), generator=torch.Generator().manual_seed(2)) / 16.0

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    testing.assert_shift_invariant(centred, input, 32.0, magnitude=32.0)
    testing.assert_rows_sum_to(0.0, centred(input), terms=input)
    testing.assert_rows_sum_to(1.0, torch.softmax(input, -1))
    testing.assert_scale_invariant(lambda x: x / x.norm(dim=-1, keepdim=True), input)
    testing.assert_column_permutation_equivariant(centred, [input])
    testing.assert_inner_products(0.0, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -1.0]]))
    with pytest.raises(AssertionError, match="plus 32"):
        testing.assert_shift_invariant(torch.sigmoid, input, 32.0)
    with pytest.raises(ValueError, match="without rounding"):
        testing.assert_shift_invariant(centred, input, 0.1)
    with pytest.raises(AssertionError, match="off 0 by"):
        testing.assert_rows_sum_to(0.0, centred(input) + 1e-3, terms=input)
    with pytest.raises(AssertionError, match="off 1 by"):
        testing.assert_rows_sum_to(1.0, torch.softmax(input, -1) * 1.0001)
    with pytest.raises(AssertionError, match="times 64"):
        testing.assert_scale_invariant(lambda x: x / (1.0 + x.norm(dim=-1, keepdim=True)), input)
    with pytest.raises(AssertionError, match="another order"):
        testing.assert_column_permutation_equivariant(lambda x: x.cumsum(-1), [input])
    with pytest.raises(AssertionError, match="off 0 by"):
        testing.assert_inner_products(0.0, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -1.1]]))


def test_cases_have_unique_ids_and_repeat_their_inputs():
    ids = [case.id for case in testing.cases()]
    assert len(ids) == len(set(ids))
    assert {case.op for case in testing.cases()} == set(testing.ops())
    case = testing.cases(["add_rms_norm"])[0]
    assert all(testing.bits_equal(left, case.inputs()[name]) for name, left in case.inputs().items())
    with pytest.raises(ValueError, match="wanted holds layer_nrom"):
        testing.cases(["layer_nrom"])


@pytest.fixture
def few_cases(monkeypatch):
    """Three cases are enough to try the command itself."""
    monkeypatch.setattr(verify, "cases", lambda wanted: testing.cases(wanted)[3:6])


def test_verify_keeps_and_compares_errors(tmp_path, capsys, few_cases):
    path, report = tmp_path / "baseline.json", tmp_path / "report.json"
    command = ["--backend", "reference", "--op", "softmax", "--baseline", str(path)]
    assert verify.main([*command, "--json", str(report)]) == 0
    assert "no errors are kept" in capsys.readouterr().out
    assert not path.exists()
    assert len(json.loads(report.read_text())["cases"]) == 6
    assert verify.main([*command, "--update"]) == 0
    kept = baseline.load(path)
    capsys.readouterr()
    assert verify.main(command) == 0
    assert "no errors are kept" not in capsys.readouterr().out

    (platform,) = kept.errors
    kept.keep(platform, "softmax/5x100/float32/normal", "output", 0.1)
    baseline.save(kept, path)
    assert verify.main(command) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 1
    assert "softmax/5x100/float32/normal output" in failures[0]
    assert "has grown from 0.1u" in failures[0]


def test_verify_fails_on_a_wrong_op_and_does_not_keep_its_errors(tmp_path, capsys, few_cases, monkeypatch):
    path = tmp_path / "baseline.json"
    right = functional.softmax
    monkeypatch.setattr(functional, "softmax", lambda *args, **keywords: right(*args, **keywords) * 1.00001)
    command = ["--backend", "reference", "--op", "softmax", "--baseline", str(path)]
    assert verify.main(command) == 1
    assert "above the budget" in capsys.readouterr().out
    assert verify.main([*command, "--update"]) == 1
    assert not path.exists()


def test_verify_lists_the_cases_that_a_backend_refuses(tmp_path, capsys, few_cases, monkeypatch):
    refused = testing.cases(["softmax"])[4].id
    right = verify.evaluate

    def evaluate(case, *args, **keywords):
        if case.id == refused:
            raise dispatch.RefusedBackendError("backend is 'reference': too wide")
        return right(case, *args, **keywords)

    monkeypatch.setattr(verify, "evaluate", evaluate)
    report = tmp_path / "report.json"
    assert verify.main(["--backend", "reference", "--op", "softmax", "--json", str(report)]) == 0
    assert "skipped 1 cases: backend is 'reference': too wide" in capsys.readouterr().out
    assert refused not in {row["case"] for row in json.loads(report.read_text())["cases"]}


def test_verify_says_when_a_backend_cannot_serve(capsys):
    if torch.cuda.is_available():
        pytest.skip("every backend may serve where there is a GPU")
    assert verify.main(["--backend", "cuda", "--op", "softmax"]) == 2
    assert "backend is 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"errors": {}, "schema_version": 0, "cases_version": 1}'])
def test_a_damaged_or_older_baseline_is_refused_and_left_alone(tmp_path, capsys, content):
    path = tmp_path / "baseline.json"
    path.write_text(content)
    assert verify.main(["--backend", "reference", "--op", "softmax", "--baseline", str(path), "--update"]) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == content


def test_exact_results_have_the_bits_on_record() -> None:
    for backend in ("reference", "cpu"):
        found = list(golden.compare(backend, torch.device("cpu")))
        assert [result.name for result in found] == list(golden.load())
        assert all(result.digest == result.kept for result in found), found


def test_a_flipped_bit_fails_verification(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, compute = next(iter(golden.GOLDEN.items()))

    def flipped(device: torch.device, backend: str | None) -> torch.Tensor:
        mask = compute(device, backend).clone()
        mask[0, 0] ^= True
        return mask

    monkeypatch.setattr(golden, "GOLDEN", {name: flipped})
    monkeypatch.setattr(verify, "cases", lambda wanted: [])
    assert verify.main(["--backend", "reference"]) == 1
    assert f"FAIL {name}: its bits have changed" in capsys.readouterr().out
    assert golden.digest(torch.zeros(2, 3)) != golden.digest(torch.zeros(3, 2)) != golden.digest(torch.zeros(6))
