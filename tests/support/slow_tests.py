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
    "tests/trainer/runtime/test_workers.py",
    "tests/trainer/data/sources/test_hub_data.py",
    "tests/trainer/data/cache/test_encodings.py::TestFill::test_worker_processes",
    "tests/trainer/runtime/test_launch.py::test_the_allocator_is_configured_before_torch_is_imported",
    "tests/trainer/test_registry.py::test_loading_a_recipe_imports_no_model_code",
    "tests/trainer/test_registry.py::test_a_new_loss_is_one_registered_class",
    "tests/trainer/denoiser/test_attention_choice.py::test_the_process_reports_which_backends_it_cannot_run",
    "tests/trainer/recipe/test_recipe_written.py::test_any_",
    "tests/trainer/publish/test_model_card.py::test_user_text_is_never_parsed_as_markup",
    "tests/quant/lora/test_shared_inputs.py",
    "tests/quant/convert/test_dequantize.py::test_dequantized_",
    "tests/quant/load/test_load.py::test_folder_of_bitsandbytes",
    "tests/quant/load/test_base_error.py::test_base_error_is_the_sum",
    "tests/quant/layers/test_linear4bit.py::test_equal_blocks_compile_once",
    "tests/quant/layers/test_linear4bit_adapters.py::test_saved_adapter_loads",
    "tests/quant/lora/test_lora_layer.py::test_backward_saves",
    "tests/quant/lora/test_lora_layer.py::test_ops_pass_opcheck",
    "tests/kernels/quantize_4bit/test_scale_search.py::test_the_file_loads",
    "tests/kernels/modulation/test_elementwise.py::test_everything_compiles",
    "tests/kernels/modulation/test_elementwise.py::test_ops_pass_opcheck",
    "tests/kernels/test_kernels_cpu.py::test_linear_4bit_opcheck",
    "tests/kernels/test_kernels_cpu.py::test_linear_int8_gradients_and_opcheck",
    "tests/quant/lora/test_lora_layer.py::test_equal_blocks_compile_once",
    "tests/kernels/attention/test_attention.py::test_the_deterministic_backward",
    "tests/kernels/test_kernels_cpu.py::test_the_int8_product_is_exact_without_vnni",
)


def slow_place(test_id: str) -> int:
    """Returns the index of the first entry of SLOW that covers a test, len(SLOW) if there is none."""
    return next((index for index, entry in enumerate(SLOW) if test_id.startswith(entry)), len(SLOW))
