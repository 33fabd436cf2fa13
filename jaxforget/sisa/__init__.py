"""SISA: exact deletion from an ensemble of shard models (Bourtoule et al., arXiv 1912.03817).

Records lie in S shards, cut into R slices each. Stage j of a shard trains on its slices 1..j from the state that stage
j - 1 left. Deleting a record changes the stages from its slice on, of its shard alone; all others stay as they are.

Every stage has a key: a digest of all that determines its parameters, the ids of its records among it (recipe.py).
Training and deletion are the same act: train the stages whose keys are not in the store (ensemble.py). The ledger
(ledger.py) says which records there are and which requests were accepted; deletion.py serves them. Read those four.
"""
