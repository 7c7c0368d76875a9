"""The tap of attention written out by hand: torch's operations followed from q·k to weights·v.

No single function is attention here, so that none can be tapped. Instead a function mode (:mod:`.follower`) sees every
torch operation of the model and keeps a **state** for each tensor that may be a part of an attention (:mod:`.states`):

    q·k -> Scores -> (scaled, capped, masked) Scores -> softmax -> Weights -> (dropout) Weights -> Weights·v: a call

- A product of two tensors is taken for scores until something shows that it is none. States cost nothing once their
  tensor is gone: the queries, keys and masks of a product that nobody needs go with it.
- The keys are the axis that is summed with the values. Mostly the softmax ran over it; where none did, or one over
  another axis, the operations between product and values say what made the weights (:mod:`.normalizer_names`).
- Scores need no matrix product: two tensors broadcast against each other are ``Pairwise`` until the width is summed
  away (:mod:`.pairwise`). Where nothing tells what scores are made of, the weights and the values that they meet name
  the axes (:mod:`.value_roles`), and the call has no q and k (:mod:`.assemble_plain`).
- A softmax may be taken in steps: ``Exponentials``, a ``RowStatistic`` (maximum, sum), ``LogWeights``. It may be
  finished after the values, or block by block: ``Unnormalized`` until something else is done with the sum
  (:mod:`.sum_rules`, :mod:`.blockwise`).
- Weights may be cut along the keys and multiplied slice by slice: ``PartialOutput`` until all slices are in. The
  largest scores alone may be softmaxed and put back: ``TopScores``. Values may be multiplied with their weights and
  summed after: ``WeightedValues``.
- Scores may be moved about before the softmax (a band, blocks in a buffer, a few keys for each query):
  ``ScatteredScores -> ScatteredWeights -> ScatteredOutput``, each with its ``Entries`` (:mod:`.entries`,
  :mod:`.entry_rules`): which score each entry is, told by running the same operations again on numbers.
- What multiplies positions by data and forms no weights is told of (:mod:`.weightless`); a product of features, of what
  is learned, or of weights with weights is nothing of ours.
- What is not understood makes scores or weights *opaque*, and is no error: the values are then the model's own.

**Which axis is what** is asked once a call is complete. For every tensor, attention or not, it is noted from which one
it came and how (:mod:`.origins`, :mod:`.view_rules`), and only then worked out what its axes are made of
(:mod:`.axis_history`). What is summed with the values are the keys. Heads have their line, or the learned map that made
them, in common with the width that q·k sums over; queries may have theirs in common with the keys; what is left is told
by elimination, or by convention, and is a guess then (:class:`.products.Roles`; without q·k :mod:`.value_roles`). What
was cut off what, and of which sequences queries and keys are, follows from the same (:mod:`.cuts`, :mod:`.sequences`).
Then :mod:`.assemble` brings everything into B H T S, or
:mod:`.assemble_scattered` with :mod:`.scattered_layout`, where scores do not lie as queries by keys.

**What an operation does** is said by its row in the table of :mod:`.operations`: what it makes of axes, of entries, and
of each state. The rules of a row take an :class:`~.operation.Operation`; those that make scores are in
:mod:`.score_rules` and :mod:`.concat_rules`, those that make weights in :mod:`.weight_rules`, and those for operations
of any name in :mod:`.rules`. Products have two operands and are read by :mod:`.product_labels` and
:mod:`.value_products`.

**What a listener changes** is put into the model by :mod:`.exchange`: the operation that formed weights, or that made
an output of them, returns another tensor, and the product in between gets other values. It lists which form can be
changed where. The score side of a call (:mod:`.score_side`) is made without its values for it.

**What ran before is recognised** and not followed again (:mod:`.recogniser`, with :mod:`.recipe`, :mod:`.learning`,
:mod:`.replay` and :mod:`.correspondence`). So a rule may depend on the operation, on states and on shapes; where it
asks for values it does so by :func:`.decisions.decide`, and where for which tensors share memory by
:func:`.decisions.see`. What it keeps of a tensor it keeps as it is, and says what is to be made of it
(:attr:`.states.Term.how`): a call that is made of the model's own tensors, and of views of them, can be made again of
those of another run.

To add an operation, add its name to a row of the table that fits, or write a row; a rule that is new goes to the file
of the state that it makes. Then add a model to tests/zoo that uses it, with the attention that it computes.
"""
