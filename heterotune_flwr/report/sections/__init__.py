"""The sections of the page, each made of a run's facts by one function; where there is nothing to tell, it says why."""
