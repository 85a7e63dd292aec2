"""Ways to follow a vector field or to undo noise, step by step: functions of a callable. Nothing here holds weights."""
