"""`tfmixed run`: a script executed by a new Python process, with mixed precision applied to its Keras models.

    command -> exec of Python with a start-up hook -> startup -> default_policy, keras_patches, training_steps (or tf1)
            -> run_summary (last line and report)

Nothing is applied before the script imports the framework, so the script can choose backend and devices first.
"""
