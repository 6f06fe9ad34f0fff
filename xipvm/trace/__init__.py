"""The event trace: one funnel, typed events, recorder and readers."""
