"""An algorithm of ours."""
