"""What is to be done next, decided purely.

Given a state, an event and a time, these modules return the next state and the actions to take:
the life of a container, idle time, what a dump or a wake needs. They do no input or output and
read no clock, so the same code runs in the unit tests, in a simulator and in architectd. Called
by ``processes``; the actions are carried out by ``adapters``.
"""
