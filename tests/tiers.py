"""The tiers of the suite: which tests are slow.

`pytest -m "not slow"` is the quick tier. Slow is what takes seconds: commands and other processes, training, real
browsers (`browser`) and databases (`database`), and lists of hundreds of cases. A test that starts a process must be
here; `conftest.py` refuses it otherwise.
"""

from typing import Any, NoReturn

import pytest

# Modules of which every test is slow. Those that take longest are first: they begin first where several workers run.
MODULES = (
    "test_train_command",
    "test_sweep_command",
    "test_contract",
    "test_signals",
    "test_speed_benches",
    "test_text_command",
    "test_option_pairs",
    "test_hostile",
    "test_hostile_text",
    "test_evaluate_command",
    "test_explore_command",
    "test_atomic",
    "test_checkpoint",
    "test_explorer_page",
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
    "test_ops",
    "test_ops_products",
    "test_ops_steps",
    "test_optim",
    "test_own_architecture",
    "test_pretrain",
    "test_publish",
    "test_quality_bench",
    "test_steer_command",
    "test_stream",
    "test_train",
    "test_wrong_flags",
)
# Slow tests of other modules.
TESTS: dict[str, tuple[str, ...]] = {
    "test_advice": (
        "test_every_flag_that_a_message_names_exists",
        "test_every_command_that_reads_text_has_a_flag_for_it",
    ),
    "test_checksum": (
        "test_one_element_of_any_type_changes_every_word_of_the_checksum",
        "test_a_page_of_zeros_is_noticed_and_so_is_a_swap_of_pages",
        "test_a_sharded_array_has_the_checksum_of_the_whole",
        "test_arrays_are_named_by_their_path",
    ),
    "test_circuit_tracer": ("test_neither_torch_nor_jax_is_loaded",),
    "test_control": (
        "test_l0_arrives_at_its_target_and_stays",
        "test_the_first_steps_are_what_the_formulas_say",
        "test_an_l0_that_starts_below_its_target_is_led_up",
    ),
    "test_corpus": (
        "test_rows_start_with_bos_and_hold_the_documents_in_one_piece",
        "test_rows_after_seek_are_the_rows_without_interruption",
        "test_the_standard_library_is_source_and_documentation",
        "test_the_standard_library_is_split_by_document",
        "test_a_seek_into_the_stdlib_goes_on_there",
    ),
    "test_dashboard_bench": ("test_sizes_that_cannot_be_measured_are_refused",),
    "test_data": (
        "test_every_block_is_drained_completely_and_mixed",
        "test_the_scale_brings_the_mean_squared_norm_to_the_width",
        "test_the_geometric_median_withstands_outliers_that_move_the_mean",
    ),
    "test_delphi": ("test_neither_torch_nor_jax_is_loaded",),
    "test_evaluate": ("test_saelens_measures_the_same",),
    "test_explorer_answers": (
        "test_a_stream_leaves_frames_out_but_never_the_last",
        "test_numbers_that_overflow_in_the_model_are_told",
    ),
    "test_explorer_labels": ("test_writers_at_the_same_time_mix_no_lines",),
    "test_explorer_wire": (
        "test_a_steered_completion_is_the_runtimes",
        "test_a_vector_steers_as_the_feature_it_is_the_row_of",
        "test_several_features_are_pushed_in_order",
        "test_a_streamed_completion_grows_to_the_whole_one",
        "test_a_chat_comes_back_as_messages_and_as_the_model_read_it",
        "test_a_closed_connection_stops_what_is_made_for_it",
        "test_where_a_layer_has_several_saes_the_set_says_which",
    ),
    "test_files": ("test_nothing_is_imported_beyond_the_standard_library",),
    "test_flags": ("test_a_field_that_no_flag_can_hold_is_a_type_error",),
    "test_handover": (
        "test_and_back_without_a_copy",
        "test_a_donated_array_is_refused",
    ),
    "test_hooks": ("test_other_bad_requests_are_refused",),
    "test_hub": ("test_names_cannot_write_on_the_card",),
    "test_jump": (
        "test_a_window_that_covers_everything_gives_thresholds_the_slope_of_a_smoothed_count",
        "test_the_penalty_of_anthropics_recipe_is_tanh_of_weighted_latents_and_a_pull_on_what_is_below",
        "test_the_gradient_of_log_thresholds_is_what_the_recipe_says_number_by_number",
        "test_thresholds_start_where_l0_is_four_times_its_target",
        "test_exported_thresholds_are_no_logarithms",
    ),
    "test_labels": (
        "test_predicates_say_what_is_so",
        "test_latents_are_named_after_what_they_fire_on",
        "test_a_model_and_its_sae_are_read_as_they_run",
        "test_of_a_latent_that_may_be_negative_the_positive_side_is_named",
        "test_the_text_is_cut_where_an_sae_fires_too_often",
    ),
    "test_locations": ("test_a_chain_of_1500_flagfiles_is_refused_and_one_of_50_is_read",),
    "test_losses": (
        "test_auxk_equals_its_definition_for_no_few_and_many_dead_latents",
        "test_the_gradient_of_auxk_reaches_encoder_and_decoder_of_the_dead_only_and_not_the_residual",
        "test_auxk_of_a_residual_that_is_zero_is_zero_with_a_finite_gradient",
        "test_squared_error_sums_over_width_and_averages_over_tokens",
    ),
    "test_metadata": ("test_kept_leaves_out_every_id_that_is_excluded",),
    "test_metrics": (
        "test_metrics_equal_the_values_worked_out_by_hand",
        "test_metrics_of_nothing_are_refused",
    ),
    "test_nanochat_checkpoint": (
        "test_without_a_meta_file_every_guess_is_named",
        "test_loading_and_running_take_no_second_copy_of_the_weights",
        "test_importing_the_package_imports_no_torch",
    ),
    "test_nanochat_formats": ("test_a_tokenizer_of_another_kind_is_refused",),
    "test_nanochat_generations": (
        "test_every_output_of_a_tiny_nanochat_is_upstreams",
        "test_a_cache_gives_the_logits_of_the_full_forward",
        "test_fresh_weights_start_at_the_loss_of_knowing_nothing_and_learn",
        "test_int32_tokens_have_the_bigrams_of_int64_tokens",
        "test_losses_of_ignored_targets_are_zero_and_bits_count_bytes",
    ),
    "test_nanochat_goldens": ("test_every_output_is_upstreams",),
    "test_neuronpedia": (
        "test_every_file_is_what_the_formats_ask_for",
        "test_every_file_is_what_the_reference_asks_for",
    ),
    "test_ops_selection": (
        "test_top_k_is_exact",
        "test_top_k_with_ties_and_infinities_picks_distinct_latents_of_the_right_values",
        "test_a_selection_refuses_a_k_that_is_not_there",
        "test_batch_top_k_keeps_the_largest_of_the_whole_batch",
        "test_batch_top_k_takes_no_equal_values_in_the_place_of_larger_ones",
        "test_batch_top_k_with_infinities_keeps_the_positive_one_and_no_negative_one",
        "test_a_batch_without_positive_numbers_has_no_codes_and_a_threshold_of_zero",
        "test_batch_top_k_gives_its_codes_in_the_order_of_the_tokens",
        "test_a_limit_lets_only_so_many_count",
        "test_a_bias_is_added_before_the_selection",
    ),
}
# Fixtures that make a test slow, and the mark that says why.
FIXTURES = {"browser": "browser", "cluster": "database"}


def mark(items: list[pytest.Item]) -> None:
    """Mark every test that is in a table above, or uses a fixture of one."""
    for item in items:
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
