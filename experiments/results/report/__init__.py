"""Pages that people open in a browser: one run, several runs, the leaderboard."""
