"""The tiers of the suite: which tests are slow.

`pytest -m "not slow"` is the quick tier. Slow is what takes seconds: commands and other processes, training, real
browsers (`browser`) and databases (`database`), and lists of hundreds of cases. A test that starts a process must be
here; `conftest.py` refuses it otherwise.

`pytest -m gpu` is the GPU tier, tests/gpu: it needs an NVIDIA GPU for torch and jax, and fails where there is none. The
other tests keep jax to the processor, so no session runs both.
"""

import os
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest

GPU_FOLDER = Path(__file__).parent / "gpu"

# Modules of which every test is slow. Those that take longest are first: they begin first where several workers run.
MODULES = (
    "test_processes",
    "test_train_on_store",
    "test_train_command",
    "test_command_output",
    "test_docs",
    "test_jsons",
    "test_library",
    "test_quick_labels",
    "test_sae_hub",
    "test_training",
    "test_card",
    "test_ten_lines",
    "test_readme",
    "test_sweep_command",
    "test_contract",
    "test_continue_command",
    "test_find_lr",
    "test_finetune",
    "test_hierarchical",
    "test_init_from",
    "test_signals",
    "test_speed_benches",
    "test_text_command",
    "test_lens_command",
    "test_trace_command",
    "test_watch",
    "test_option_pairs",
    "test_hostile",
    "test_hostile_text",
    "test_evaluate_command",
    "test_explore_command",
    "test_atomic",
    "test_checkpoint",
    "test_collect_command",
    "test_explorer_page",
    "test_explorer_share",
    "test_explorer_two_runs",
    "test_explorer_lens_page",
    "test_explorer_graphs",
    "test_explorer_tracing",
    "test_explorer_lenses",
    "test_explorer_seeds",
    "test_explorer_stages",
    "test_explorer_checkpoints",
    "test_explorer_live",
    "test_explorer_files",
    "test_explorer_server",
    "test_explorer_connections",
    "test_export",
    "test_export_command",
    "test_foreign",
    "test_health",
    "test_hooks_compiled",
    "test_house",
    "test_importer",
    "test_locks",
    "test_model_hub",
    "test_open_files",
    "test_metadata",
    "test_ops",
    "test_ops_kernels",
    "test_ops_mesh",
    "test_mesh_training",
    "test_collectives",
    "test_ops_products",
    "test_ops_selection",
    "test_ops_steps",
    "test_optim",
    "test_output_gradient",
    "test_own_architecture",
    "test_pretrain",
    "test_series",
    "test_absorption",
    "test_probing",
    "test_publish",
    "test_quality_bench",
    "test_run",
    "test_saelens_files",
    "test_steer_command",
    "test_stages",
    "test_provenance",
    "test_exclusive",
    "test_stored_text",
    "test_stream",
    "test_recovery",
    "test_synthetic_peer",
    "test_train",
    "test_ablations_bench",
    "test_circuits_bench",
    "test_alarms_bench",
    "test_rates_bench",
    "test_truth_bench",
    "test_wrong_flags",
    "test_compiled_forward",
    "test_decoding",
)
# Slow tests of other modules.
TESTS: dict[str, tuple[str, ...]] = {
    "test_advice": (
        "test_every_flag_that_a_message_names_exists",
        "test_messages_about_data_name_flags_of_all_commands_that_read_it",
        "test_every_command_that_reads_text_has_a_flag_for_it",
    ),
    "test_checksum": (
        "test_one_element_of_any_type_changes_every_word_of_the_checksum",
        "test_the_places_of_numbers_count",
        "test_a_page_of_zeros_is_noticed_and_so_is_a_swap_of_pages",
        "test_a_sharded_array_has_the_checksum_of_the_whole",
        "test_numbers_keys_and_empty_arrays_have_checksums_of_their_own",
        "test_arrays_are_named_by_their_path",
    ),
    "test_circuit_tracer": (
        "test_numbers_that_are_none_are_refused",
        "test_neither_torch_nor_jax_is_loaded",
    ),
    "test_circuits": (
        "test_every_row_sums_to_its_value",
        "test_every_row_sums_to_its_value_in_float32",
        "test_the_frozen_network_is_linear_and_gives_the_models_activations",
        "test_ablations_of_the_strongest_features_are_reported",
        "test_the_size_of_a_batch_changes_nothing_but_rounding",
    ),
    "test_control": (
        "test_l0_arrives_at_its_target_and_stays",
        "test_the_first_steps_are_what_the_formulas_say",
        "test_an_l0_of_zero_or_beyond_all_bounds_moves_the_strength_by_a_bounded_factor",
        "test_an_l0_that_starts_below_its_target_is_led_up",
    ),
    "test_corpus": (
        "test_rows_start_with_bos_and_hold_the_documents_in_one_piece",
        "test_rows_after_seek_are_the_rows_without_interruption",
        "test_the_standard_library_is_source_and_documentation",
        "test_the_standard_library_is_the_same_in_every_process",
        "test_the_standard_library_is_split_by_document",
        "test_arguments_out_of_range_are_errors",
        "test_a_seek_into_the_stdlib_continues_there",
    ),
    "test_dashboard_bench": (
        "test_a_peer_that_ends_says_why",
        "test_sizes_that_cannot_be_measured_are_refused",
    ),
    "test_data": (
        "test_every_block_is_drained_completely_and_mixed",
        "test_blocks_are_permuted_differently",
        "test_an_array_is_walked_round_and_round",
        "test_the_scale_brings_the_mean_squared_norm_to_the_width",
        "test_the_geometric_median_withstands_outliers_that_move_the_mean",
    ),
    "test_delphi": (
        "test_two_tokens_of_the_same_bytes_keep_a_name_each",
        "test_neither_torch_nor_jax_is_loaded",
    ),
    "test_evaluate": (
        "test_other_widths_empty_text_and_broken_models_are_refused",
        "test_saelens_measures_the_same",
    ),
    "test_explorer_answers": (
        "test_a_stream_leaves_frames_out_but_never_the_last",
        "test_the_largest_answer_needs_little_memory_and_keeps_nobody_waiting",
        "test_a_seed_that_is_written_as_a_float_is_whole",
        "test_logits_that_overflow_are_reported",
    ),
    "test_explorer_labels": (
        "test_files_of_names_that_are_hostile_take_little_time_and_memory",
        "test_broken_automatic_labels_say_how_to_make_them_anew",
        "test_writers_at_the_same_time_mix_no_lines",
    ),
    "test_explorer_wire": (
        "test_a_steered_completion_is_the_runtimes",
        "test_a_vector_steers_as_the_feature_it_is_the_row_of",
        "test_several_features_are_pushed_in_order",
        "test_a_streamed_completion_grows_to_the_whole_one",
        "test_a_chat_comes_back_as_messages_and_as_the_model_read_it",
        "test_a_closed_connection_stops_what_is_made_for_it",
        "test_a_vector_without_direction_is_refused",
        "test_where_a_layer_has_several_saes_the_set_says_which",
    ),
    "test_files": (
        "test_a_file_that_does_not_fit_leaves_the_old_one",
        "test_a_folder_survives_a_kill_at_every_call_of_the_system",
        "test_a_full_disk_in_any_library_is_reported_with_the_path",
        "test_bytes_are_appended_all_or_none",
        "test_every_line_that_was_acknowledged_is_in_the_file_when_the_disk_is_full",
        "test_lines_of_several_processes_do_not_mix",
        "test_a_second_process_is_refused_with_the_holder_of_the_lock",
        "test_a_lock_may_be_taken_twice_in_one_process_and_ends_with_the_last",
        "test_a_lock_has_one_holder_although_its_file_is_created_and_removed",
        "test_the_note_of_a_killed_holder_is_not_taken_for_the_one_that_holds",
        "test_a_folder_without_locks_is_warned_of",
        "test_nothing_is_imported_beyond_the_standard_library",
    ),
    "test_flags": (
        "test_help_into_a_reader_that_leaves_is_no_error",
        "test_flags_may_be_defined_where_one_likes",
        "test_a_field_that_no_flag_can_hold_is_a_type_error",
    ),
    "test_handover": (
        "test_and_back_without_a_copy",
        "test_token_ids_are_refused",
        "test_a_donated_array_is_refused",
    ),
    "test_hooks": (
        "test_a_name_that_does_not_exist_is_refused_with_those_that_do",
        "test_other_bad_requests_are_refused",
    ),
    "test_hub": (
        "test_what_was_sent_is_read_here_and_by_saelens",
        "test_without_an_evaluation_the_card_says_what_training_said",
        "test_names_cannot_write_on_the_card",
    ),
    "test_jump": (
        "test_a_window_that_covers_everything_gives_thresholds_the_slope_of_a_smoothed_count",
        "test_the_penalty_of_anthropics_recipe_is_tanh_of_weighted_latents_and_a_pull_on_what_is_below",
        "test_the_penalty_of_gemma_scopes_recipe_is_the_number_of_active_latents",
        "test_the_gradient_of_log_thresholds_is_what_the_recipe_says_number_by_number",
        "test_thresholds_start_where_l0_is_four_times_its_target",
        "test_exported_thresholds_are_no_logarithms",
    ),
    "test_labels": (
        "test_predicates_hold_where_they_should",
        "test_latents_are_labelled_by_the_tokens_they_fire_on",
        "test_tokens_that_do_not_count_are_in_no_number",
        "test_a_model_and_its_sae_are_read_as_they_run",
        "test_of_a_latent_that_may_be_negative_the_positive_side_is_named",
        "test_the_text_is_cut_where_an_sae_fires_too_often",
    ),
    "test_lenses": (
        "test_jacobians_are_finite_differences_summed_over_later_targets",
        "test_lenses_of_halves_merge_to_the_lens_of_all",
        "test_any_number_of_copies_gives_the_same_jacobians",
        "test_a_fit_ends_when_the_mean_has_settled_or_prompts_end",
        "test_a_tuned_lens_starts_as_the_logit_lens_and_learns",
    ),
    "test_locations": (
        "test_flagfiles_that_are_none_are_refused_in_one_line",
        "test_a_chain_of_1500_flagfiles_is_refused_and_one_of_50_is_read",
    ),
    "test_losses": (
        "test_auxk_equals_its_definition_for_no_few_and_many_dead_latents",
        "test_the_gradient_of_auxk_reaches_encoder_and_decoder_of_the_dead_only_and_not_the_residual",
        "test_auxk_of_a_residual_that_is_zero_is_zero_with_a_finite_gradient",
        "test_l1_weighs_latents_by_their_decoder_norm",
        "test_squared_error_sums_over_width_and_averages_over_tokens",
    ),
    "test_metrics": (
        "test_metrics_equal_the_values_worked_out_by_hand",
        "test_the_histogram_has_a_bin_for_one_firing_and_for_all",
        "test_metrics_of_nothing_are_refused",
    ),
    "test_nanochat_checkpoint": (
        "test_without_a_meta_file_every_guess_is_named",
        "test_a_meta_file_that_contradicts_the_weights_or_asks_the_absurd_is_refused",
        "test_a_meta_file_of_gigabytes_is_not_read",
        "test_loading_and_running_take_no_second_copy_of_the_weights",
        "test_importing_the_package_imports_no_torch",
    ),
    "test_nanochat_formats": (
        "test_nanochats_own_file_counts_where_both_are",
        "test_a_tokenizer_of_another_kind_is_refused",
    ),
    "test_nanochat_generations": (
        "test_every_output_of_a_tiny_nanochat_is_upstreams",
        "test_a_cache_gives_the_logits_of_the_full_forward",
        "test_fresh_weights_start_at_the_loss_of_knowing_nothing_and_learn",
        "test_int32_tokens_have_the_bigrams_of_int64_tokens",
        "test_chat_wants_the_last_word_to_be_the_users",
        "test_losses_of_ignored_targets_are_zero_and_bits_count_bytes",
    ),
    "test_nanochat_goldens": (
        "test_every_output_is_upstreams",
        "test_a_checkpoint_moved_next_to_its_tokenizer_finds_it",
    ),
    "test_neuronpedia": (
        "test_every_file_is_what_the_formats_ask_for",
        "test_every_file_is_what_the_reference_asks_for",
        "test_the_names_of_nanochat_sae_are_there",
    ),
    "test_ranges": (
        "test_a_seed_out_of_range_is_refused",
        "test_a_strength_out_of_its_modes_range_is_refused_by_name",
        "test_the_command_refuses_the_same_before_it_loads_a_model",
    ),
    "test_records": (
        "test_the_direct_path_is_the_derivative_of_the_last_residual",
        "test_records_of_the_demo_match_its_activations",
        "test_the_same_run_gives_the_same_records",
        "test_an_interrupted_gathering_leaves_earlier_records",
        "test_a_turned_direct_path_is_warned_of_and_turns_the_logits",
        "test_too_many_open_files_are_not_reported_as_broken_records",
    ),
    "test_progress": ("test_neither_jax_nor_torch_is_needed",),
    "test_relu": ("test_latents_shrink_less_than_under_l1",),
    "test_report": ("test_a_full_disk_is_one_error_and_leaves_whole_reports",),
    "test_run_config": ("test_the_processor_says_how_much_memory_it_has",),
    "test_runtime": (
        "test_cached_decoding_with_steering_is_the_uncached_forward",
        "test_a_generation_is_the_engines",
        "test_a_steered_generation_is_greedy_on_uncached_logits",
        "test_a_generation_ends_at_a_stop_token_and_at_the_last_position",
        "test_two_generations_may_go_on_by_turns",
        "test_the_packaged_nanochat_says_what_its_tokenizer_decodes",
        "test_attribution_is_activation_times_the_finite_difference",
        "test_a_model_that_makes_no_cache_generates_the_same",
        "test_the_runtime_runs_without_jax",
    ),
    "test_sae_config": (
        "test_bookkeeping_is_what_the_trainer_of_saelens_writes_beside_what_is_read",
        "test_a_setting_of_another_kind_is_refused_by_name_or_changes_nothing",
        "test_a_description_of_another_kind_is_refused_by_name",
        "test_a_broken_file_of_settings_is_refused_in_one_line",
        "test_a_place_on_neuronpedia_is_written_where_saelens_looks_for_it",
    ),
    "test_sources": (
        "test_an_array_that_is_read_in_parts_is_whole",
        "test_a_parquet_file_with_a_byte_changed_is_read_or_named",
        "test_a_document_above_16_mib_is_refused_and_one_below_is_read_in_pieces",
        "test_a_file_that_was_only_touched_is_read_on",
        "test_a_changed_module_of_the_standard_library_is_noticed",
        "test_too_many_open_files_are_reported_and_nothing_is_left_out",
    ),
    "test_store": (
        "test_a_store_that_is_killed_at_random_moments_ends_as_one_that_was_not",
        "test_a_full_disk_is_one_error_and_the_store_continues_when_there_is_room",
        "test_a_value_that_does_not_fit_leaves_the_old_one",
        "test_reading_and_writing_need_neither_jax_nor_torch",
    ),
    "test_store_objects": ("test_the_command_writes_to_object_storage",),
    "test_store_source": (
        "test_training_from_a_store_equals_training_on_the_same_rows_in_memory",
        "test_a_store_of_one_hook_is_trained_on_as_it_is",
        "test_a_transcoder_reads_two_hooks",
        "test_an_interrupted_training_continues_to_the_same_numbers",
    ),
    "test_synthetic": (
        "test_an_interrupted_training_ends_with_the_same_weights",
        "test_compensated_features_fire_about_as_often_as_the_zipf_law_says",
        "test_children_of_parents_that_are_not_exclusive_fire_together",
        "test_rows_do_not_depend_on_the_size_of_blocks",
        "test_a_child_is_scaled_by_its_parent",
    ),
    "test_steering": ("test_a_request_cannot_be_changed",),
    "test_tokenizer": (
        "test_white_space_that_overflows_the_regex_engine_is_encoded",
        "test_a_table_that_calls_something_is_refused_and_not_run",
    ),
}
# Fixtures that make a test slow, and the mark that says why.
FIXTURES = {"browser": "browser", "cluster": "database"}


def wants_gpu(marks: str) -> bool:
    """Return whether the expression of `pytest -m` asks for the GPU tier."""
    return re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", marks)) is not None


def is_gpu(path: Path) -> bool:
    """Return whether a file or folder belongs to the GPU tier."""
    return GPU_FOLDER in (path, *path.parents)


def require_gpu() -> None:
    """End the session with an error unless torch sees a GPU; that jax does is checked when the tier begins.

    Under JSAE_REHEARSAL=cpu the tier runs on the processor, to try the tests themselves.
    """
    import torch

    if os.environ.get("JSAE_REHEARSAL") == "cpu":
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        pytest.exit(f"no GPU was found: torch {torch.__version__}, {built}, sees none. -m gpu needs one", returncode=1)


def mark(items: list[pytest.Item]) -> None:
    """Mark every test that is in a table above, in the folder of the GPU tier, or uses a fixture of one."""
    for item in items:
        if is_gpu(item.path):
            item.add_marker("gpu")
            item.add_marker("slow")
        module, name = module_of(item), getattr(item, "originalname", item.name)
        reasons = [reason for fixture, reason in FIXTURES.items() if fixture in getattr(item, "fixturenames", ())]
        for reason in reasons:
            item.add_marker(reason)
        if reasons or module in MODULES or name in TESTS.get(module, ()):
            item.add_marker("slow")


def module_of(item: pytest.Item) -> str:
    """Return the name of the module that a test is in."""
    return item.path.stem


def place(item: pytest.Item) -> int:
    """Return where a test's module stands in the order of the suite; all but the long ones keep the order they have."""
    module = module_of(item)
    return MODULES.index(module) if module in MODULES else len(MODULES)


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for starting a process, in a test of the quick tier."""
    pytest.fail("this test starts a process: name it in tests/tiers.py, or start none", pytrace=False)
