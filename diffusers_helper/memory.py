"""Moving models between host and GPU when they do not all fit: whole, or streamed block by block.

Built on diffusers' group offloading (`ModuleGroup`, `GroupOffloadingHook`): a group keeps its host copy
while its weights are on the GPU, so that giving the GPU memory back copies nothing. The library's own
`apply_group_offloading` is not used as it stands because it would also move, at every step and without
prefetch, what is not a block (a gigabyte of embedders here), and cannot keep as many blocks as fit.

On a CPU there is nothing to move and every call is a no-op.
"""

import ctypes
import gc
import mmap
import weakref
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingHook,
    GroupOffloadingType,
    ModuleGroup,
)
from torch import nn

GB = 1024**3
CPU = torch.device("cpu")
_HOOK = "dynamic_swap"
_LARGE = 1024**2  # bytes; smaller tensors may share a page with others, which cannot be pinned twice
_MADV_DONTFORK, _MADV_DOFORK = 10, 11  # Linux
_libc = ctypes.CDLL(None)

_complete: WeakKeyDictionary[nn.Module, ModuleGroup] = WeakKeyDictionary()
_streamed: WeakKeyDictionary[nn.Module, "_StreamedModel"] = WeakKeyDictionary()
_pinned: WeakKeyDictionary[nn.Module, weakref.finalize] = WeakKeyDictionary()


def free_gpu_memory(device: torch.device) -> int:
    """Bytes this process can still allocate on `device`: free ones, the allocator's unused ones, up to the
    fraction set by `torch.cuda.set_per_process_memory_fraction`."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + unused, int(total * fraction) - allocated)


def release_unused_memory(device: torch.device) -> None:
    """Give back what the allocator holds without need, after dropping dead references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_for_good() -> None:
    """Leave all that there is out of later collections, each of which would look at half a million objects.

    That takes 0.5 s on a slow core: for what the libraries and the models are made of, once they are loaded.
    """
    gc.collect()
    gc.freeze()


def release_dropped_models(device: torch.device) -> None:
    """`release_unused_memory` where models were dropped, which were to be kept for good."""
    gc.unfreeze()
    release_unused_memory(device)
    gc.freeze()


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error, or a CUDA library's that could not allocate its workspace."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "ALLOC_FAILED" in str(error)
    )


def is_gpu_failure(error: BaseException) -> bool:
    """Any other CUDA error: the context is lost, and only a new process has a new one."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def is_pinned(model: nn.Module) -> bool:
    """Whether its host copy is pinned, as it is from its first use until `forget`."""
    return model in _pinned


def bytes_on_gpu(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()] if t.is_cuda)


def least_streamed_bytes(model: nn.Module) -> int:
    """GPU memory `DynamicSwapInstaller` takes at the least: all that is not a block, the first one, the one
    that computes and the one on its way."""
    blocks = [weight_bytes(block) for blocks in _block_lists(model) for block in blocks]
    return weight_bytes(model) - sum(blocks) + min(sum(blocks), 3 * max(blocks))


def load_model_as_complete(model: nn.Module, target_device: torch.device) -> None:
    """Put a whole model on the GPU until `unload_complete_models`."""
    if target_device.type == "cpu":
        return
    if model not in _complete:
        _pin_in_place(model)
        _complete[model] = _group([model], target_device, torch.cuda.Stream(target_device))
    _onload(_complete[model])


def unload_complete_models(*models: nn.Module) -> None:
    """Take these models off the GPU, or all that were loaded as complete."""
    for model in models or list(_complete):
        if model in _complete:
            _complete[model].offload_()


class DynamicSwapInstaller:
    """Runs a model that need not fit on the GPU: what fits stays there, the rest is streamed.

    Streamed are the layers of its `ModuleList`s, in order; while one computes, the next is copied from
    pinned memory on a second stream.
    """

    @staticmethod
    def install_model(model: nn.Module, device: torch.device, preserved_gb: float = 0.0) -> int:
        """Make `model` ready to run on `device`, keeping `preserved_gb` free for its activations.

        Returns how many blocks stay on the GPU. Undone by `uninstall_model`.
        """
        if device.type == "cpu":
            return sum(len(blocks) for blocks in _block_lists(model))
        if model not in _streamed:
            _streamed[model] = _StreamedModel(model, device)
        return _streamed[model].install(preserved_gb * GB)

    @staticmethod
    def uninstall_model(model: nn.Module) -> None:
        """Take the model off the GPU; the host copies stay."""
        if model in _streamed:
            _streamed[model].uninstall()


def forget(model: nn.Module) -> None:
    """Drop the groups of a model that will stay on the GPU, or is to be freed, and unpin its weights."""
    unload_complete_models(model)
    DynamicSwapInstaller.uninstall_model(model)
    _complete.pop(model, None)
    _streamed.pop(model, None)
    if (unpin := _pinned.pop(model, None)) is not None:
        unpin()


class _StreamedModel:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        _pin_in_place(model)
        lists = _block_lists(model)
        blocks = [block for blocks in lists for block in blocks]
        in_blocks = {id(t) for block in blocks for t in [*block.parameters(), *block.buffers()]}
        self.rest = _group(
            [],
            device,
            self.stream,
            parameters=[p for p in model.parameters() if id(p) not in in_blocks],
            buffers=[b for b in model.buffers() if id(b) not in in_blocks],
        )
        self.blocks = [_group([block], device, self.stream) for block in blocks]
        self.bytes = [weight_bytes(block) for block in blocks]

    def install(self, preserved: float) -> int:
        release_unused_memory(self.device)
        _onload(self.rest)
        budget = free_gpu_memory(self.device) - preserved
        resident = len(self.blocks)
        if sum(self.bytes) > budget:
            budget -= 2 * max(self.bytes)  # the block that computes and the one on its way
            # the first always stays: step caches read its modulation, or run it alone, to see whether to skip
            while resident > 1 and sum(self.bytes[:resident]) > budget:
                resident -= 1
        for group in self.blocks[:resident]:
            _onload(group)
        self._hook(self.blocks[resident:])
        return resident

    def _hook(self, groups: list[ModuleGroup]) -> None:
        """Each streamed block fetches its successor, the last one the first for the next step."""
        config = GroupOffloadingConfig(
            onload_device=self.device,
            offload_device=CPU,
            offload_type=GroupOffloadingType.BLOCK_LEVEL,
            non_blocking=True,
            record_stream=False,
            low_cpu_mem_usage=False,
            num_blocks_per_group=1,
            stream=self.stream,
        )
        chained = len(groups) > 1
        for group, following in zip(groups, groups[1:] + groups[:1], strict=True):
            hook = GroupOffloadingHook(group, config=config)
            hook.next_group = following if chained else None
            group.onload_self = not chained
            HookRegistry.check_if_exists_or_initialize(group.offload_leader).register_hook(hook, _HOOK)

    def uninstall(self) -> None:
        torch.cuda.synchronize(self.device)
        for group in self.blocks:
            registry = getattr(group.offload_leader, "_diffusers_hook", None)
            if registry is not None and registry.get_hook(_HOOK) is not None:
                registry.remove_hook(_HOOK)
            group.offload_()
        self.rest.offload_()


def _block_lists(model: nn.Module) -> list[nn.ModuleList]:
    return [child for child in model.children() if isinstance(child, nn.ModuleList)]


def _group(
    modules: list[nn.Module], device: torch.device, stream: torch.cuda.Stream, **tensors: list[torch.Tensor]
) -> ModuleGroup:
    group = ModuleGroup(
        modules=modules,
        offload_device=CPU,
        onload_device=device,
        offload_leader=modules[-1] if modules else None,
        onload_leader=modules[0] if modules else None,
        non_blocking=True,
        stream=stream,
        record_stream=False,
        low_cpu_mem_usage=False,
        **tensors,
    )
    group.offload_()  # from here on its pinned host copies are the weights
    return group


def _pin_in_place(model: nn.Module) -> None:
    """Pin the model's large weights where they lie.

    `pin_memory()` would allocate them anew, each rounded up to a power of two (40 GB become 57), and zero
    and copy every page. Weights mapped from a file cannot be pinned and are copied off it first.
    """
    if model in _pinned:
        return
    cudart = torch.cuda.cudart()
    pinned = []
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_cuda or tensor.nbytes < _LARGE or tensor.is_pinned():
            continue
        if not _register(cudart, tensor.data):
            tensor.data = tensor.data.clone()
            if not _register(cudart, tensor.data):
                continue  # the group pins it its own way
        pinned.append(tensor.data)
    _pinned[model] = weakref.finalize(model, _unregister, pinned)
    _pinned[model].atexit = False  # the process's end frees it all, and CUDA may be gone by then


def _register(cudart, tensor: torch.Tensor) -> bool:
    registered = (
        tensor.is_contiguous() and int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0
    )
    if registered:
        _advise(tensor, _MADV_DONTFORK)
    return registered


def _unregister(tensors: list[torch.Tensor]) -> None:
    """Runs while `tensors` are still alive: freed memory must not stay registered."""
    torch.cuda.synchronize()
    for tensor in tensors:
        _advise(tensor, _MADV_DOFORK)
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Keep the pages out of children, or not: Linux copies pinned pages at fork, 40 GB for one ffmpeg."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - first
    _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


def _onload(group: ModuleGroup) -> None:
    """Copy to the GPU and wait, so that any stream may read the weights."""
    group.onload_()
    group.stream.synchronize()
