"""One step late: every rank scales its own gradient by the last verdict, and votes for the next one."""
