"""How the user pages are built: `just docs`."""

project = "GPT-OSS-Vision"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]
