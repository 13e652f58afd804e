"""Names of SAELens settings that describe how an SAE was trained or stored, and do not change what it computes."""

_TRAINING = """
adam_beta1 adam_beta2 aux_loss_coefficient b_dec_init_method decoder_heuristic_init decoder_heuristic_init_norm
decoder_init_norm decoder_orthogonal_init from_pretrained_path init_encoder_as_decoder_transpose
jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale
l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps lp_norm lr lr_decay_steps lr_end lr_scheduler_name
lr_warm_up_steps matryoshka_widths mse_loss_normalization n_restart_cycles noise_scale normalize_sae_decoder
pre_act_loss_coefficient scale_sparsity_penalty_by_decoder_norm seed target_l0 topk_threshold_lr
use_matryoshka_aux_loss use_sparse_activations expansion_factor finetuning_method finetuning_tokens
"""
_DEAD_LATENTS = """
dead_feature_estimation_method dead_feature_threshold dead_feature_window feature_reinit_scale
feature_sampling_method feature_sampling_window resample_batches use_ghost_grads
"""
_DATA = """
act_store_device activations_mixing_fraction cached_activations_path context_size dataset_path
dataset_trust_remote_code disable_concat_sequences exclude_special_tokens is_dataset_tokenized
n_batches_for_norm_estimate n_batches_in_buffer prefetch_llm_batches prepend_bos seqpos_slice
sequence_separator_token store_batch_size store_batch_size_prompts streaming tokens_per_buffer total_training_tokens
train_batch_size train_batch_size_tokens training_tokens use_cached_activations use_chat_formatting
"""
_MODEL = """
hf_hook_name hf_hook_name_out hook_eval hook_head_index_out hook_layer hook_layer_out hook_point_eval
hook_point_layer llm_device model_from_pretrained_kwargs model_kwargs
"""
_RUNNER = """
autocast autocast_lm checkpoint_path compile_llm compile_sae eval_batch_size_prompts eval_every_n_wandb_logs
llm_compilation_mode log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb logger n_checkpoints
n_eval_batches output_path resume resume_from_checkpoint run_name sae_compilation_mode sae_lens_training_version
save_final_checkpoint unique_id verbose wandb_entity wandb_id wandb_log_frequency wandb_project
"""

BOOKKEEPING = frozenset(" ".join((_TRAINING, _DEAD_LATENTS, _DATA, _MODEL, _RUNNER)).split())
"""Every setting outside `metadata` that may occur in a `cfg.json` and is ignored."""
