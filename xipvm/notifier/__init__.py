"""MMU notifiers: how the primary MMU tells secondary MMUs to drop what they cached."""
