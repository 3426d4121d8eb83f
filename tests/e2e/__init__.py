"""architect as its users have it: installed with helm on a real cluster of three nodes."""
