"""What users do to a training run, and the tests that show what then happens. Every test that is named here exists."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.support.tool_runs import ROOT

LOADER, TOOLS, MODEL, RANKS = "tests/pipeline/loader", "tests/tools", "tests/model", "tests/model/parallel"
STOPPING, RESUMING, LOST_INPUT = (f"{TOOLS}/test_{name}.py" for name in ("stopping", "resuming", "lost_input"))
FAULTS, CHECKPOINT, RUNS = f"{RANKS}/test_faults.py", f"{MODEL}/test_checkpoint.py", f"{MODEL}/test_runs.py"
TRAIN_TOOL, RUN_ALL, WRONG_INPUT = (f"{TOOLS}/test_{name}.py" for name in ("train_tool", "run_all", "wrong_input"))

CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "a stored image is overwritten": {
        f"{LOADER}/test_jpeg_headers.py": ("test_a_broken_header_is_named", "test_nothing_behind_the_data_is_read"),
        TRAIN_TOOL: ("test_a_damaged_image_stops_training_or_is_skipped_and_named",),
        f"{LOADER}/test_bad_samples.py": (
            "test_the_full_check_replaces_every_damaged_image",
            "test_evaluation_stops_or_leaves_out_damaged_images",
            "test_the_crc_finds_a_change_that_no_decoder_sees",
        ),
    },
    "an image of the validation set is damaged": {
        RESUMING: ("test_an_image_that_damages_the_validation_does_not_cost_the_epoch",)
    },
    "Ctrl-C, a closed terminal, SIGTERM": {
        STOPPING: (
            "test_ctrl_c_and_a_closed_terminal_save",
            "test_ctrl_c_in_a_validation_saves_the_epoch",
            "test_a_second_ctrl_c_ends_at_once",
            "test_under_torchrun_every_stop_ends_with_0",
        ),
        TRAIN_TOOL: ("test_a_run_that_sigterm_stops_resumes_to_the_same_losses",),
        RUN_ALL: (
            "test_a_signal_saves",
            "test_the_same_command_continues_a_run",
            "test_after_sigterm_no_further_tool_starts",
        ),
        FAULTS: ("test_sigterm_on_one_rank_stops_all_and_another_number_of_ranks_resumes",),
        f"{MODEL}/test_trainer.py": (
            "test_stopped_at_any_step_and_resumed_equals_uninterrupted",
            "test_stopped_in_a_validation_and_resumed_equals_uninterrupted",
        ),
    },
    "the screen is a closed pipe or a full disk": {
        STOPPING: (
            "test_training_goes_on_when_the_screen_fails",
            "test_training_goes_on_without_standard_streams",
            "test_a_stream_on_a_full_disk_never_raises",
        )
    },
    "a copy of a checkpoint is beside it": {CHECKPOINT: ("test_folders_with_other_names_are_left_alone",)},
    "background load during the run only": {
        "tests/pipeline/diagnosis/test_run_account.py": (
            "test_background_load_only_during_the_run_is_the_verdict",
            "test_since_when_a_run_was_slow",
        )
    },
    "a run is started twice at once": {
        RESUMING: ("test_a_second_start_of_a_run_is_refused",),
        RUNS: (
            "test_a_second_training_in_a_run_folder_is_refused",
            "test_a_holder_on_another_machine_counts_as_alive_while_it_refreshes_the_lock",
        ),
    },
    "evaluation on other classes or another mean": {
        RESUMING: ("test_evaluate_refuses_other_classes", "test_evaluate_refuses_another_mean"),
        CHECKPOINT: ("test_a_checkpoint_knows_its_data",),
    },
    "ranks with different options": {
        FAULTS: ("test_ranks_with_different_options_do_not_start",),
        f"{RANKS}/test_meeting.py": ("test_the_first_value_that_differs_is_named_with_both_hosts",),
    },
    "a home folder that cannot be written": {
        "tests/pipeline/test_compiled.py": ("test_without_a_cache_functions_are_compiled_and_one_line_warns",)
    },
    "a stop or a full disk in the report": {
        STOPPING: (
            "test_a_signal_in_the_report_keeps_the_training_and_resuming_makes_the_report",
            "test_a_report_that_fails_does_not_change_the_exit_code",
        ),
        TRAIN_TOOL: ("test_a_run_that_was_killed_resumes_to_the_same_losses",),
    },
    "a rank hashes for longer than the hang limit": {
        f"{RANKS}/test_meeting.py": (
            "test_a_rank_waits_as_long_as_another_works",
            "test_a_mistake_on_one_rank_ends_all_and_gives_one_message",
            "test_no_rank_waits_for_one_that_ended_otherwise",
        )
    },
    "numbers outside their range": {
        WRONG_INPUT: ("test_wrong_input_gets_one_line_and_code_2",),
        f"{TOOLS}/test_command_line.py": ("test_a_number_below_its_limit_is_named_as_it_was_typed",),
    },
    "resuming with other learning rates": {
        RESUMING: ("test_the_learning_rates_may_be_scaled_on_resuming",),
        CHECKPOINT: ("test_the_learning_rates_may_be_scaled_on_resuming",),
        RUNS: ("test_what_may_change_is_recorded", "test_the_one_setting_that_differs_is_named"),
    },
    "the last checkpoint is truncated": {
        RESUMING: (
            "test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used",
            "test_resuming_from_an_earlier_checkpoint",
            "test_no_whole_checkpoint_is_an_error",
        ),
        CHECKPOINT: ("test_the_last_whole_checkpoint_is_found_and_every_damaged_file_is_named",),
    },
    "a bit of a checkpoint is flipped": {CHECKPOINT: ("test_a_flipped_bit_is_found",)},
    "config.json or metrics.jsonl is damaged or lost": {
        RUNS: (
            "test_a_damaged_config_is_refused_with_its_name",
            "test_a_run_whose_config_is_lost_is_not_begun_anew",
            "test_a_foreign_line_of_metrics_is_named",
        )
    },
    "evaluation without the training set": {RESUMING: ("test_evaluate_needs_the_checkpoint_and_the_shards_only",)},
    "nodes without a common run folder": {
        FAULTS: ("test_ranks_without_a_common_run_folder_are_told_so_and_can_resume",)
    },
    "a tar is truncated, replaced or unreadable during training": {
        LOST_INPUT: (
            "test_a_tar_that_is_truncated_during_training_is_named_and_no_step_is_lost",
            "test_a_set_that_is_removed_during_training_changes_nothing",
            "test_a_disk_that_fails_to_read_is_named",
        ),
        "tests/pipeline/shards/test_tar_files.py": (
            "test_a_loader_whose_tar_is_truncated_raises_and_no_signal_ends_it",
            "test_an_open_tar_that_is_replaced_or_removed_keeps_its_content",
        ),
    },
    "another validation set, --steps with --val, a death in a validation, a typing mistake in TRAIN_OPTIONS": {
        CHECKPOINT: ("test_the_best_is_chosen_among_validations_on_the_last_set",),
        RESUMING: ("test_a_run_that_ends_within_an_epoch_is_validated_once",),
        RUNS: ("test_a_validation_that_will_be_made_again_is_dropped",),
        LOST_INPUT: ("test_a_final_validation_that_was_logged_but_not_saved_is_made_once",),
        RUN_ALL: ("test_a_wrong_train_option_is_found_before_any_work",),
    },
    "tools as modules, paths as texts, a JSON file that cannot be written": {
        TRAIN_TOOL: ("test_a_run_that_sigterm_stops_resumes_to_the_same_losses",),  # started as a script and a module
        CHECKPOINT: ("test_a_flipped_bit_is_found", "test_a_checkpoint_knows_its_data"),  # load_model and load_data
        RESUMING: ("test_evaluate_refuses_other_classes",),  # open_shards
        WRONG_INPUT: ("test_wrong_input_gets_one_line_and_code_2",),
    },
}


@cache
def names_in(file: str) -> set[str]:
    """Names of the test functions in a file."""
    found = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("case", CASES)
def test_the_tests_of_a_case_exist(case: str):
    missing = [f"{file}: {name}" for file, names in CASES[case].items() for name in names if name not in names_in(file)]
    assert CASES[case] and not missing
