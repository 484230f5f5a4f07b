"""The stream between two workers: of one node over a Unix socket pair, of two nodes through Redis.

Records of one loop pass leave as one batch. A batch is kept until the other worker has confirmed it: it
confirms, cumulatively, how many bytes of the stream it has dealt with, its writes to agents included. What it
had not confirmed when it died can be taken back, to tell the senders.

Stream: batches. Batch: BatchHead, then its records. Record: Record, then `size` bytes, padded to a multiple
of 8. Numbers are in the byte order of the machine; nodes of another order do not understand each other, and
`RemoteHead.magic` says so.

Between nodes each published piece of the stream says where in it it belongs (RemoteHead). A receiver that
misses something says so, and the stream begins anew: what was not confirmed goes back to its senders. The
number of a stream is that of the life of the process, which is random, and of the stream in it, which
grows: what is left of an older stream is known as such, whatever the clocks say.

A message that is passed on to another worker, and was confirmed to whoever sent it here, stays in the ledger
until the other worker has confirmed it.

Workers have numbers. Those of this node are 0 to MAX_WORKERS - 1; that of worker W at node N is
N * MAX_WORKERS + W, with N from 1. What a node says to another uses the latter for its own workers, too.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from gateway._ledger cimport Ledger

cdef enum:
    MAX_WORKERS = 64        # of one node
    LINK_MAX = 4_194_304    # bytes that may wait to be confirmed: a third of a second at 20,000 messages/s
    LINK_RESERVE = 2_097_152  # beyond that, for ERRORs and for what moves sessions
    BATCH_MAX = 65_536      # bytes after which a new batch begins
    LINK_ACCOUNT = 12_582_912  # beyond that, for what waits here of another node: a whole ledger
    CONFIRM_BYTES = 65_536  # of batches, after which they are confirmed even if there is nothing else to say

cdef enum RecordKind:
    ROUTED = 1   # a message for (connection, epoch) of the other worker
    FIRST_OTHER  # from here on: for the handler, see gateway.moves

cdef struct Record:
    uint32_t size        # of the payload, in bytes
    uint16_t origin      # worker to which the sender of the message is connected
    uint16_t kind
    uint32_t connection
    uint32_t unused
    uint64_t epoch

cdef struct BatchHead:
    uint32_t size        # of the records behind it, in bytes
    uint32_t unused
    uint64_t confirmed   # bytes of the opposite stream

cdef enum:
    STREAM_BITS = 24    # of the number of a stream; the others are the life

cdef enum RemoteKind:
    PIECE = 1  # batches follow
    RESET      # what you say in `stream` cannot be followed: begin anew

cdef struct RemoteHead:
    uint32_t magic
    uint16_t kind
    uint16_t source     # the worker that says it
    uint64_t stream     # life << STREAM_BITS | how many streams began in it before
    uint64_t position   # of the first byte that follows, in the stream
    uint64_t confirms   # the opposite stream, to which BatchHead.confirmed belongs

# Takes one record; the payload is valid during the call.
ctypedef int (*Deliver)(void* owner, Link link, const Record* record, const char* payload) except -1

cdef class Link:
    cdef:
        readonly int worker      # at the other end
        readonly int fd          # -1: closed, or none
        readonly bint is_open
        readonly bint is_blocked  # the socket takes no more; or nothing any more
        bint is_silent            # the last read found nothing
        # What was said to the other worker and not confirmed: `out[0]` is byte `base` of the stream.
        char* out                # owned
        size_t out_size, out_capacity
        size_t written           # bytes of `out` that the kernel has taken
        size_t batch             # where the open batch begins; == out_size: none is open
        uint64_t base
        uint64_t asked           # where the last batch with records ends: up to there it is to be confirmed
        Ledger ledger            # where what is passed on is written down
        list passed              # (end in the stream, number in the ledger) of what is, and is not confirmed
        # What it said to us.
        char* held               # owned: the beginning of a batch whose rest is not here yet
        size_t held_size, held_capacity
        uint64_t dealt_with      # bytes of its stream in whole batches that were delivered
        uint64_t written_out     # ... and whose messages were written to the agents
        uint64_t told            # ... and confirmed
        bint has_records         # in what was dealt with since
        bint owes                # a confirmation of records

    # Add a record to the open batch. False: more than `limit` bytes would wait to be confirmed.
    cdef bint append(self, size_t limit, uint16_t kind, uint16_t origin, uint32_t connection, uint64_t epoch,
                     const char* payload, size_t size) except -1
    # The record that was added last is written down in the ledger until it is confirmed.
    cdef int answer_for(self, int number) except -1
    cdef int hand_off(self, uint64_t position) except -1
    # Bytes that wait to be confirmed; 0 if all that does is a confirmation.
    cdef size_t unconfirmed(self) noexcept
    cdef void end_batch(self) noexcept
    # Everything that was dealt with has been written to the agents.
    cdef void settle(self) noexcept
    # End the open batch; if there is only a confirmation to say and it is time, make a batch of it.
    cdef int seal(self, bint confirm_now) except -1
    # Write what waits, with a confirmation of everything that was dealt with. False: the link is broken.
    cdef bint flush(self, bint confirm_now) except -1
    # Read once, delivering whole batches. False: the link is broken.
    cdef bint read(self, char* buffer, size_t capacity, Deliver deliver, void* owner) except -1
    cdef size_t deliver_batches(self, char* data, size_t size, Deliver deliver, void* owner) except? 0
    cdef int confirm(self, uint64_t position) except -1
    cdef int reserve(self, size_t more) except -1
    # The number by which this node knows the worker that the other end calls `number`.
    cdef uint16_t local(self, uint16_t number) noexcept

# A link to a worker of another node.
cdef class RemoteLink(Link):
    cdef:
        object publish       # (worker, bytes): sends a piece
        uint16_t node        # number of this one
        uint16_t source      # number of this worker for others
        uint64_t stream      # ours, and that of the other end; 0: nothing was heard
        uint64_t opposite
        set formers          # lives of the other end before the present one
        uint32_t known_as    # source under which the ledger knows the other end; 0: not known yet
        bint may_confirm     # what is being read belongs to our present stream

    # Take a piece that was published. False: our stream must begin anew.
    cdef bint take(self, bytes piece, Deliver deliver, void* owner) except -1
    cdef bint is_next(self, uint64_t stream) except -1
    cdef int say_reset(self, uint64_t stream) except -1
