/*
 * A term, its lease, and the raft terms of etcd: ../guarantees.md, "1. A term ends locally before etcd lets anybody
 * else win". README.md says how this is checked, and what is left out.
 *
 * One session keeps one lease, whose key is the oldest of its queue: another wins as soon as the lease or the key
 * is gone. Time passes in ticks of etcd's clock. Everything else takes any time or none: requests, answers, pauses of
 * the process, elections of etcd's own leader.
 */

#define TTL      6      /* of the lease */
#define MARGIN   2
#define STOPPING 1      /* how long work takes to stop when its term has ended */
#define TERMS    3      /* raft terms: etcd's leader changes twice */

/* ---- Safeguards of the library. Each WITHOUT_... takes one away, and must break a rule. ---- */

#define MONOTONIC 0
#define WALL      1
#define later(a)   (a[MONOTONIC] > a[WALL] -> a[MONOTONIC] : a[WALL])
#define earlier(a) (a[MONOTONIC] < a[WALL] -> a[MONOTONIC] : a[WALL])

#ifndef WITHOUT_MARGIN
#define SPAN (TTL - MARGIN)             /* how long a renewal is good for, from S */
#else
#define SPAN TTL
#endif

#if defined(WITHOUT_WALL_CLOCK)         /* "Both clocks are read" */
#define valid (age[MONOTONIC] < SPAN)
#elif defined(WITHOUT_MONOTONIC_CLOCK)
#define valid (age[WALL] < SPAN)
#else
#define valid (later(age) < SPAN)
#endif

#ifndef WITHOUT_SEND_TIME               /* "S is taken before sending" */
#define counts_from(c) asked[c]
#else
#define counts_from(c) 0                /* S is the moment when the answer comes */
#endif

#ifndef WITHOUT_SAME_TERM               /* "A renewal counts only with a read in the same raft term" */
#define same_term (header == seen)
#else
#define same_term true
#endif

#if defined(WITHOUT_READ_AFTERWARDS)    /* "So after the acknowledgement the library sends a linearizable read" */
#define may_read true
#elif defined(WITH_READ_BESIDE)              /* breaks nothing: see README.md */
#define may_read (step == sent || step == received || step == acknowledged)
#else
#define may_read (step == acknowledged)
#endif

#ifndef WITHOUT_DEADLINE_WINS           /* "The deadline wins" */
#define in_time valid
#else
#define in_time true
#endif

#if defined(WITHOUT_MARGIN_KEPT)        /* "The margin is kept" */
#define may_revoke true
#elif defined(WITHOUT_EXPIRY_BY_BOTH_CLOCKS)
#define may_revoke (later(age) >= TTL)
#else
#define may_revoke (earlier(age) >= TTL)
#endif

#ifndef WITHOUT_END_BEFORE_DELETION     /* "Resign ends the term locally before it asks etcd to delete the key" */
#define end_term resigned = true; over = true; work = 0
#else
#define end_term skip
#endif

/* ---- Assumptions. Each AGAINST_... takes one away, and must break a rule. ---- */

/* 1. While etcd counts TTL, the local clock counts more than TTL - MARGIN, and what is left of the margin is enough
   for work to stop: the clock misses a tick, and then none for a TTL. 2. One of the two clocks is like that. */
#if defined(AGAINST_CLOCK_BOUND)
#define APART 2
#elif defined(AGAINST_SOUND_CLOCK)
#define APART 1
#else
#define APART TTL
#endif

/* 3. etcd keeps a lease for its TTL: no deposed leader revokes what its successor has renewed, and a successor gives
   each lease its whole TTL again. */
#ifndef AGAINST_WHOLE_TTL
#define shortest TTL
#else
#define shortest 1                      /* the lease continues from a checkpoint */
#endif

/* 4. An acknowledgement answers the renewal that it is matched to, and not an earlier one. */
#ifndef AGAINST_ANSWERS_IN_ORDER
#define given_up(acknowledgement) skip
#else
byte former;
#define given_up(acknowledgement) former = acknowledgement
#endif

/* 6. The raft term in an acknowledgement is one that the member has applied before it renews, and no leader of an
   older term renews. */
#ifndef AGAINST_NO_OLDER_LEADER
#define oldest_leader header
#else
#define oldest_leader 1
#endif

/* ---- Rules. Each is true until it is broken. ---- */

bool exclusion = true;  /* when another wins, nobody believes in the term */
bool margin = true;     /* when another wins, work that stops in time has stopped */
bool finality = true;   /* a term that was over does not come back */
#ifndef JUDGE
#define judge(rule, holds) rule = (holds); assert(rule)
#else                   /* -DJUDGE=RULE: one rule alone */
#define judge(rule, holds) rule = (holds); assert(JUDGE)
#endif

/* Things that happen: with -DREACH=EVENT the model claims that EVENT never does. Spin must refute that. */
#define RENEWAL_COUNTS           1
#define RENEWAL_IS_REFUSED       2  /* its read was answered in another raft term */
#define DEPOSED_LEADER_RENEWS    3
#define ANSWER_COMES_TOO_LATE    4  /* the deadline came first */
#define LEASE_EXPIRES            5  /* and another wins */
#define TERM_IS_RESIGNED         6  /* and another wins */
#define EXPIRED_LEASE_IS_REVOKED 7  /* by its owner, because etcd has prolonged it, and another wins */
#define LAST_TERM_RENEWS         8  /* a renewal counts after all changes of etcd's leader */
#ifndef REACH
#define REACH 0
#endif
bool claim = true;
#define reach(event) claim = (REACH != event); assert(claim)

/* ---- State ---- */

/* Of etcd. */
byte term = 1;              /* the newest raft term that has a leader */
bool settled = true;        /* an entry of it is committed; until then its leader neither renews nor answers reads */
bool unaware[TERMS + 1];    /* the leader of that term was deposed and does not know it */
bool granted;               /* the lease has been granted */
byte left;                  /* ticks until the lease expires, as counted by the leader of the newest term */
bool won;                   /* the lease or the key is gone, and another has won */

/* Of the session. S is the moment before the last renewal that counted was sent; the first one is the grant. */
byte age[2] = TTL;          /* of S, by each clock */
byte asked[2];              /* how long ago the request that is under way was sent, by each clock */
mtype = { granting, idle, sent, received, acknowledged };
mtype step = granting;      /* what is under way: the grant, nothing, or a renewal */
byte header;                /* the raft term in its acknowledgement; 0: none yet */
byte seen;                  /* the raft term in the answer to the read that makes the renewal count; 0: none yet */
bool resigned;
bool revoking;              /* the owner's request to delete the key or to revoke the lease is under way */
#define believes (valid && !resigned)

/* Of the rules. */
byte work;                  /* ticks until all work of the term has stopped */
bool over;                  /* the term has been over */
byte sound;                 /* the clock for which assumption 1 holds */
byte since = APART;         /* ticks since the sound clock missed one */

/* ---- The session ---- */

inline forget() {
  step = idle; header = 0; seen = 0; asked[MONOTONIC] = 0; asked[WALL] = 0
}

/* The renewal or the grant counts. */
inline count() {
  age[MONOTONIC] = counts_from(MONOTONIC); age[WALL] = counts_from(WALL);
  forget();
  judge(finality, !(over && believes));
  if
  :: believes -> work = STOPPING
  :: else
  fi
}

active proctype session() {
end:
  do
  /* The grant counts from the moment before it was sent. It goes through raft, so it needs no read. */
  :: d_step { step == granting && granted -> count() }

  /* A renewal is sent, and may be given up at any time. */
  :: d_step { step == idle && believes -> step = sent }
  :: d_step { step == sent || step == received || step == acknowledged -> given_up(header); forget() }

  /* It counts if it was acknowledged and the read that followed was answered in the same raft term, all before the
     deadline. */
  :: d_step { step == acknowledged && seen != 0 ->
       if
       :: !same_term -> reach(RENEWAL_IS_REFUSED); forget()
       :: same_term && !in_time -> reach(ANSWER_COMES_TOO_LATE); forget()
       :: same_term && in_time ->
            reach(RENEWAL_COUNTS);
            if
            :: seen == TERMS -> reach(LAST_TERM_RENEWS)
            :: else
            fi;
            count()
       fi }

  /* Resign. Work has stopped before Resign is called. */
  :: d_step { believes && !revoking -> end_term; revoking = true }

  /* The lease of an expired session is revoked: etcd may have prolonged it. */
  :: d_step { step == idle && !believes && !resigned && may_revoke && !revoking -> revoking = true }
  od
}

/* ---- etcd ---- */

inline another_wins() {
  won = true;
  judge(exclusion, !believes);
  judge(margin, work == 0)
}

active proctype etcd() {
  byte t;

end:
  do
  :: d_step { step == granting && settled && !granted -> granted = true; left = TTL }

  /* A renewal does not go through raft. The member that receives it fills in the raft term of the last entry that it
     has applied, and then lets a leader renew. That leader may have been deposed: then its count does not matter. */
  :: atomic { step == sent -> select(header : 1 .. term); step = received }
  :: atomic { step == received && !won ->
       select(t : oldest_leader .. term);
       if
       :: t == term && settled && left > 0 -> left = TTL; step = acknowledged
       :: t < term && unaware[t] -> reach(DEPOSED_LEADER_RENEWS); step = acknowledged
       :: else   /* refused */
       fi;
#ifdef AGAINST_HEADER_BEFORE_RENEWAL
       if
       :: step == acknowledged -> select(header : header .. term)
       :: else
       fi;
#endif
       t = 0 }
#ifdef AGAINST_ANSWERS_IN_ORDER
  :: d_step { step == sent && former != 0 -> header = former; former = 0; step = acknowledged }
#endif

  /* A linearizable read, answered by the leader that a quorum has confirmed. */
  :: d_step { step != granting && may_read && settled && seen == 0 -> seen = term }

  /* Another leader is elected. The former one learns of it sooner or later. */
  :: d_step { term < TERMS -> unaware[term] = settled; term++; settled = false }
  :: d_step { unaware[1] -> unaware[1] = false }
  :: d_step { unaware[2] -> unaware[2] = false }
  :: atomic { !settled -> settled = true;
       if
       :: granted && !won -> select(left : shortest .. TTL)
       :: else
       fi }

  /* The lease or the key goes. */
  :: d_step { settled && granted && !won && left == 0 -> reach(LEASE_EXPIRES); another_wins() }
  :: d_step { settled && granted && !won && revoking ->
       if
       :: resigned -> reach(TERM_IS_RESIGNED)
       :: else -> reach(EXPIRED_LEASE_IS_REVOKED)
       fi;
       another_wins() }
#ifdef AGAINST_NO_EARLY_REVOCATION
  :: d_step { granted && !won && (unaware[1] || unaware[2]) -> another_wins() }    /* a deposed leader revokes */
#endif
  od
}

/* ---- Time ---- */

inline advance(clock) {
  if
  :: age[clock] < TTL -> age[clock]++
  :: else
  fi;
  if
  :: step != idle && asked[clock] < TTL -> asked[clock]++
  :: else
  fi
}

/* A tick of etcd's clock. */
inline tick() {
  if
  :: settled && left > 0 -> left--
  :: else
  fi;
  if
  :: !believes && work > 0 -> work--
  :: else
  fi
}

inline look() {
  over = over || (step != granting && !believes)
}

active proctype time() {
  atomic {
    if
    :: sound = MONOTONIC
    :: sound = WALL
    fi
  };
end:
  do
  :: d_step { !won -> tick(); advance(sound); since = (since < APART -> since + 1 : APART); look() }
  :: d_step { !won && since == APART -> tick(); since = 1; look() }    /* the sound clock misses this tick */

  /* The other clock stands still until it is set forward. The monotonic clock of a suspended machine stands still, and
     a clock that is set back seems to. A clock that counts is the same as one that is set forward at the end. */
  :: d_step { !won -> age[1 - sound] = TTL; asked[1 - sound] = (step != idle -> TTL : 0); look() }
  od
}
