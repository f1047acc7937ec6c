"""Browser app: planner, kept tokens and benchmark. Needs gradio (`pip install 'peft-bsr[app]'`)."""
