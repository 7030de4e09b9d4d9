"""Many runs: grids, searches, launchers."""
