"""Error rates of the gate, counted on rounds whose truth is known; not part of the wheel."""
