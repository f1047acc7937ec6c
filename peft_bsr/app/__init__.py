"""The planner, the kept tokens and the benchmark in a browser. Needs gradio (`pip install 'peft-bsr[app]'`)."""
