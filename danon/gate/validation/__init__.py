"""How often the gate errs, counted on rounds whose truth is known."""
