"""Small models with random weights on this library: the same logits, losses and gradients, and generation.

For models of transformers the reference is the model on the CPU in fp32, with transformers' own functions in PyTorch.
"""

import collections
import contextlib
import copy
import functools
import math
from unittest import mock

import pytest
import torch
from harness import DEVICE, GPU, mark_slow, needs_gpu, rms_error
from test_adapters_fla import log_decays

import fla_simple_gla
from fla_simple_gla.adapters import _patch, patch

WORDS, PAD = 40, 0
TOKENS = 13
ROWS = dict(hidden_size=32, vocab_size=WORDS, pad_token_id=PAD, bos_token_id=None, eos_token_id=None)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
# The models, with what makes them small. Groups are more than one where each version has a norm for each group.
CONFIGS = {
    'Mamba2': dict(num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
    'NemotronH': dict(
        layers_block_type=['mamba', 'attention', 'mamba', 'mlp'], mamba_num_heads=4, mamba_head_dim=16, head_dim=8,
        ssm_state_size=8, n_groups=2, chunk_size=8, **ATTENTION,
    ),
    'Bamba': dict(num_hidden_layers=2, attn_layer_indices=[1], mamba_n_groups=1, **ATTENTION, **MAMBA),
    'FalconH1': dict(num_hidden_layers=1, mamba_n_groups=2, mamba_d_ssm=64, head_dim=8, **ATTENTION, **MAMBA),
    'GraniteMoeHybrid': dict(
        num_hidden_layers=2, layer_types=['mamba', 'attention'], num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=48, mamba_n_groups=1, **ATTENTION, **MAMBA,
    ),
    'Zamba2': dict(
        num_hidden_layers=2, layers_block_type=['mamba', 'hybrid'], num_attention_heads=4, intermediate_size=48,
        n_mamba_heads=4, mamba_d_state=8, mamba_ngroups=2, chunk_size=8, adapter_rank=4, use_mem_eff_path=True,
    ),
    'Mamba': dict(num_hidden_layers=2, state_size=8),
}  # fmt: skip
SCAN, SPLIT, STEP = 'mamba_chunk_scan_combined', 'mamba_split_conv1d_scan_combined', 'selective_state_update'
# The Mamba-1 model has ours only where it decodes.
MAMBA_2 = [name for name in CONFIGS if name != 'Mamba']
SLOW = [] if GPU else ['NemotronH', 'FalconH1', 'GraniteMoeHybrid', 'Zamba2']


def make_model(name: str):
    transformers = pytest.importorskip(
        'transformers', minversion='5.17', reason='transformers 5.17 or newer is not installed'
    )
    if not hasattr(transformers, f'{name}Config'):
        pytest.skip(f'transformers {transformers.__version__} has no {name}')
    config = getattr(transformers, f'{name}Config')(**ROWS, **CONFIGS[name])
    model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith('dt_bias'):
                weight.uniform_(-4, -1)  # step sizes of 0.02 to 0.3: heads remember for 1 to 50 tokens
            elif weight.dim() == 1 and 'A_log' not in key:
                weight.add_(0.2 * torch.randn(len(weight)))  # so that heads and channels differ
            elif 'in_proj' in key:
                weight.mul_(8)  # so that states have a part in the result
    return model


@contextlib.contextmanager
def functions_in_pytorch():
    """The wrappers of transformers call the functions in PyTorch, whatever is installed, as in an export."""
    with mock.patch('transformers.integrations.hub_kernels.is_torchdynamo_exporting', lambda: True):
        yield


@contextlib.contextmanager
def patched():
    """Transformers is patched. How often each of our functions is called."""
    calls = collections.Counter()

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    functions = {name: counted(function) for name, function in _patch.WRAPPED.items()}
    with mock.patch.dict(_patch.WRAPPED, functions), patch('transformers') as report:
        assert not report.skipped, str(report)
        yield calls


def words(*shape: int) -> torch.Tensor:
    return torch.randint(1, WORDS, shape)


def on_device(model, inputs: dict) -> tuple:
    return copy.deepcopy(model).to(DEVICE), {name: x.to(DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('name', mark_slow(MAMBA_2, *SLOW))
def test_logits(name, side):
    """One sequence of a batch is padded."""
    model = make_model(name)
    inputs = dict(input_ids=words(2, TOKENS), attention_mask=torch.ones(2, TOKENS, dtype=torch.long))
    padding = slice(0, 5) if side == 'left' else slice(TOKENS - 5, TOKENS)
    inputs['input_ids'][1, padding], inputs['attention_mask'][1, padding] = PAD, 0
    kept = inputs['attention_mask'].bool()
    with torch.no_grad():
        with functions_in_pytorch():
            expected = model(**inputs).logits[kept]
        ours, inputs = on_device(model, inputs)
        with patched() as calls:
            found = ours(**inputs).logits.cpu()[kept]
    assert {*calls} == {SCAN}
    assert expected.std() > 0.1 and rms_error(found, expected) < 1e-5


@pytest.mark.parametrize('name', mark_slow(MAMBA_2, *SLOW))
def test_training(name):
    """One sequence is padded on the right, and its padding has no part in the loss."""
    model = make_model(name).train()
    ids = words(2, TOKENS)
    inputs = dict(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids))
    inputs['input_ids'][1, 9:], inputs['labels'][1, 9:], inputs['attention_mask'][1, 9:] = PAD, -100, 0
    ours, inputs_of_ours = on_device(model, inputs)
    with functions_in_pytorch():
        expected = model(**inputs, use_cache=False).loss
    expected.backward()
    with patched() as calls:
        found = ours(**inputs_of_ours, use_cache=False).loss
        found.backward()
    assert {*calls} == {SPLIT}
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-5)
    for (key, x), other in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert (x.grad is None) == (other.grad is None), key
        if other.grad is not None:
            # those of the reference itself are good to 1e-5
            assert rms_error(x.grad.cpu(), other.grad) < 3e-5, key


@pytest.mark.parametrize('name', mark_slow(CONFIGS, *SLOW))
def test_generation(name):
    """The tokens are those of the reference. The logits of single steps are its logits of all tokens at once."""
    model = make_model(name)
    inputs = dict(input_ids=words(2, TOKENS - 4))
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with functions_in_pytorch():
        expected = model.generate(**inputs, **options).sequences
        with torch.no_grad():
            at_once = model(expected).logits[:, TOKENS - 5 : -1]
    ours, inputs = on_device(model, inputs)
    with patched() as calls:
        found = ours.generate(**inputs, **options)
    assert {*calls} == ({STEP} if name == 'Mamba' else {SCAN, STEP}) and calls[STEP] % 5 == 0
    assert torch.equal(found.sequences.cpu(), expected)
    assert rms_error(torch.stack(found.logits, 1).cpu(), at_once) < 1e-5


@needs_gpu
def test_retnet(untuned, monkeypatch):
    """The model of fla, in bfloat16: logits are those of fla's kernels, gradients those of the formula in fp32."""
    models = pytest.importorskip('fla.models.retnet', reason='flash-linear-attention is not installed')
    config = models.RetNetConfig(hidden_size=128, num_heads=2, num_hidden_layers=2, vocab_size=WORDS)
    model = models.RetNetForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
    ids = words(2, 150).to(DEVICE)
    weight = torch.randn(2, 150, WORDS, device=DEVICE)
    with torch.no_grad():
        expected = model(ids).logits

    def naive(q, k, v, initial_state=None, output_final_state=False, cu_seqlens=None):
        decays = log_decays('retention', v.shape[2]).to(v.device, torch.float32)
        o, state = fla_simple_gla.naive_chunk_simple_gla(
            q.float(), k.float(), v.float(), None, initial_state, output_final_state, g_gamma=decays
        )
        return o.to(q.dtype), state

    def gradients():
        trained = copy.deepcopy(model).train()
        (trained(ids, use_cache=False).logits * weight).sum().backward()
        return {key: x.grad for key, x in trained.named_parameters()}

    with patch('fla') as report:
        assert 'fla.layers.multiscale_retention' in report.replaced['fla']['chunk_retention']
        with torch.no_grad():
            assert rms_error(model(ids).logits, expected) < 1e-2
            found = model(ids[:, :100], use_cache=True)
            pieces = [found.logits]
            for t in range(100, 110):
                found = model(ids[:, t : t + 1], past_key_values=found.past_key_values, use_cache=True)
                pieces.append(found.logits)
            assert rms_error(torch.cat(pieces, 1), expected[:, :110]) < 1e-2
        ours = gradients()
    monkeypatch.setattr('fla.layers.multiscale_retention.chunk_retention', naive)
    for key, x in gradients().items():
        assert rms_error(ours[key], x) < 2e-2, key


@needs_gpu
def test_layer_of_fla(untuned):
    """It reads a prompt and decodes. `test_fla.py` has its gradients."""
    module = pytest.importorskip(
        'fla.layers.simple_gla', reason='fla-core has no layers: they are in flash-linear-attention'
    )
    from fla.models.utils import Cache

    layer = module.SimpleGatedLinearAttention(hidden_size=256, num_heads=4, layer_idx=0).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 110, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)[0]
        with patch('fla'):
            assert module.chunk_simple_gla is fla_simple_gla.chunk_simple_gla
            assert rms_error(layer(x)[0], expected) < 1e-2
            cache = Cache()
            pieces = [layer(x[:, :100], past_key_values=cache, use_cache=True)[0]]
            pieces += [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in range(100, 110)]
    assert module.chunk_simple_gla is not fla_simple_gla.chunk_simple_gla
    assert rms_error(torch.cat(pieces, 1), expected) < 1e-2
