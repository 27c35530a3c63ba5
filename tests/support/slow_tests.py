"""The list of slow tests: conftest.py marks them `slow`, and `scripts/test --fast` leaves them out."""

# Beginnings of test ids, the slowest first: folders, files or tests that train, export or push whole models or start
# other processes. Their files also start in this order, so that no process is left with a long file at the end.
SLOW = (
    "tests/whole_runs/",
    "tests/faults/",
    "tests/trainer/export/",
    "tests/trainer/publish/test_push",
    "tests/trainer/publish/test_hub_checks.py",
    "tests/trainer/publish/test_xet_faults.py",
    "tests/trainer/training/",
    "tests/trainer/sample/",
    "tests/trainer/run_folder/test_pinned_base.py",
    "tests/trainer/run_folder/test_resume_settings.py",
    "tests/trainer/plan/",
    "tests/trainer/cuda_graphs/",
    "tests/trainer/quantize/",
    "tests/trainer/adapters/",
    "tests/trainer/hub/",
    "tests/trainer/pretrained/",
    "tests/trainer/families/",
    "tests/trainer/cli/",
    "tests/quant/stock/",
    "tests/quant/layers/test_exact.py",
    "tests/scripts/",
    "tests/docs/test_site.py",
    "tests/trainer/runtime/test_launch.py::test_the_allocator_is_configured_before_torch_is_imported",
    "tests/trainer/test_registry.py::test_loading_a_recipe_imports_no_model_code",
    "tests/trainer/test_registry.py::test_a_new_loss_is_one_registered_class",
    "tests/trainer/denoiser/test_attention_choice.py::test_the_process_reports_which_backends_it_cannot_run",
    "tests/trainer/recipe/test_recipe_written.py::test_any_",
    "tests/trainer/publish/test_model_card.py::test_user_text_is_never_parsed_as_markup",
    "tests/quant/lora/test_shared_inputs.py::test_blocks_compile_with_checkpointing",
    "tests/quant/lora/test_lora_layer.py::test_equal_blocks_compile_once",
    "tests/kernels/attention/test_attention.py::test_the_deterministic_backward",
    "tests/kernels/test_kernels_cpu.py::test_the_int8_product_is_exact_without_vnni",
)


def slow_place(test_id: str) -> int:
    """Returns the index of the first entry of SLOW that covers a test, len(SLOW) if there is none."""
    return next((index for index, entry in enumerate(SLOW) if test_id.startswith(entry)), len(SLOW))
