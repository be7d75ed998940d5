"""`mor experiment`: a set of trainings and evaluations from one TOML file, and what they show."""
