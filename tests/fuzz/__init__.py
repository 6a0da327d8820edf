"""Hostile files: mutated copies of everything that csq reads must work or be refused in one line.

    python -m tests.fuzz --cases 20000 --seed 0

A corpus is made by csq itself (the digits network in every form, checkpoints, a resume state, recipes, images) and by hand.
Each case takes one file of it, mutates it, and gives it to one reader: a function of the package, or the command line in
this process. Some know the structure: manifests that agree with themselves around another statement, files whose hashes are right,
programs for the pickle machine, images that are not what they say, environment variables, names. Case ``i`` of a seed
is always the same input; ``--only i --keep DIR`` repeats it and keeps the file.

What counts as a failure: any exception but UserError, more than one line on stderr, five seconds of the processor, more than 512 MiB over
the process's size before (or what 4 GiB of address space refuse), a model delivered that is not finite or not what its
manifest says, and, by an audit hook: an import, a connection, a process, a file written outside the case's folder, or a
file read that only the input names. Cases run in a child process, so a crash or a kill is reported with its number.
"""
