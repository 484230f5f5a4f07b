"""Every size and every time of the protocol: name, unit, reason.

Both sides read them here; the gateway announces the ones a client must obey in its first REGISTER.
"""

from typing import Final

PROTOCOL_VERSION: Final = "1.0"
SUBPROTOCOL: Final = "ioap.v1"
ENDPOINT_PATH: Final = "/ws"
DATA_CHANNEL_LABEL: Final = "ioap"

# --- sizes -------------------------------------------------------------------------------------

MESSAGE_MAX_BYTES: Final = 65_536  # one SDP with 100 candidates is 12 KiB
MESSAGE_MAX_DEPTH: Final = 32  # nesting of objects and arrays; the envelope is level 1
DATA_MESSAGE_MAX_BYTES: Final = 262_144  # aiortc and Chromium refuse a longer SCTP message
INLINE_MAX_BYTES: Final = 16_384  # of an envelope with its JSON; what is longer is attached
CHUNK_MAX_BYTES: Final = 16_384  # of one DATA frame: 20 ms at 6 Mbit/s, for all other calls to wait
FRAME_HEAD_BYTES: Final = 17  # kind and call
ATTACHMENTS_MAX: Final = 64  # of one message
ATTACHMENTS_MAX_BYTES: Final = 268_435_456  # of one peer, in memory at one time; a stream has no limit
ATTACHED_JSON_MAX_BYTES: Final = 16_777_216  # of one message: a parser may take 3 s and 30 times the memory
CALL_WINDOW_BYTES: Final = 1_048_576  # of one call and direction, unread: 80 Mbit/s over 100 ms
CALL_CREDIT_BYTES: Final = 262_144  # taken and not granted: four CREDIT frames for each window
NONCE_BYTES: Final = 32  # as long as the key that signs it: never the weakest part
INTEGER_MAX: Final = 2**53 - 1  # I-JSON, RFC 7493 section 2.2: beyond it a double loses digits

CAPABILITIES_MAX: Final = 32  # of one agent
CAPABILITIES_MAX_BYTES: Final = 8_192  # together, as JSON; the gateway keeps them in memory
AWAY_MAX_MESSAGES: Final = 64  # wait for a dropped session: an offer and its candidates
AWAY_MAX_BYTES: Final = 65_536
WRITE_QUEUE_MAX_BYTES: Final = 1_048_576  # 16 of the largest messages; above it: slow consumer
REPLAY_GUARD_CAPACITY: Final = 65_536  # ids; 8 MiB, 270 messages a second over the window
MESSAGE_RATE: Final = 200  # messages per second of one session: ten connections set up in a second
MESSAGE_BURST: Final = 1_000  # messages at once: what an agent says that meets fifty others

# --- times -------------------------------------------------------------------------------------

REGISTER_TIMEOUT_SECONDS: Final = 10.0  # two round trips over a bad mobile link
REGISTER_CLOCK_SKEW_SECONDS: Final = 60.0  # gateway and agent; the gateway's `time` shows the gap
CLOCK_SKEW_SECONDS: Final = 120.0  # agent and agent: each may be off by the above
PING_INTERVAL_SECONDS: Final = 25.0  # of silence; proxies and NATs drop after 30 to 60
PONG_TIMEOUT_SECONDS: Final = 10.0
DRAIN_SECONDS: Final = 10.0  # until a gateway that stops has sent everybody away
AWAY_SECONDS: Final = 30.0  # a change of network takes a phone 5 to 20
TURN_TTL_SECONDS: Final = 86_400  # of TURN credentials: draft-uberti-behave-turn-rest-00 section 2.2
RECONNECT_BASE_SECONDS: Final = 0.5
RECONNECT_MAX_SECONDS: Final = 30.0  # an outage that lasted is over for all within this time
CONNECT_TIMEOUT_SECONDS: Final = 20.0  # ICE and DTLS over a relay; aiortc itself never gives up
CALL_TIMEOUT_SECONDS: Final = 60.0
STREAM_TIMEOUT_SECONDS: Final = 3_600.0  # until its last part: 1 GB at 2.4 Mbit/s
REQUEST_TIMEOUT_SECONDS: Final = 10.0  # an answer from the gateway
PEER_PING_INTERVAL_SECONDS: Final = 5.0  # aiortc notices a dead peer only after 63
PEER_PONG_TIMEOUT_SECONDS: Final = 10.0
PEER_STALL_SECONDS: Final = 60.0  # the largest message, over 35 kbit/s
PEER_IDLE_SECONDS: Final = 300.0  # without a call; to connect anew takes a tenth of a second
GATHER_TIMEOUT_SECONDS: Final = (
    5.0  # for STUN and TURN servers to answer: three tries (RFC 8489 section 6.2.1)
)
