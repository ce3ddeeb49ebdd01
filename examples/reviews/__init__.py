"""Film reviews, fresh or rotten: one classification task learned in three ways, beside what needs no language model.

data        the reviews, split so that no film is on both sides
plain       two baselines: the larger class, and logistic regression on tf-idf
chat        a chat model: as it is, its label by likelihood; and with LoRA, trained to answer with the label
encoder     MiniLM with a head for two classes, with LoRA
compare     the script: trains, asks, and prints the table
"""
