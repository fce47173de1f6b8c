"""Tables, figures and numbers of the report."""
