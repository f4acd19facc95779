/*
 * The queue, its watches at members that lag, and requests that arrive late: ../guarantees.md, "4. First come, first
 * served", "3. No phantoms, zombies or orphans" and "Requests that arrive late". README.md says how this is checked,
 * and what is left out.
 *
 * Each candidate has one key. Its name is the same whenever the candidate campaigns again, because other terms of its
 * process keep the lease alive. Requests are carried out at any time or never. Watches begin anywhere in the past.
 * Reads are linearizable. A read and what follows from it are one step.
 */

#ifndef CANDIDATES
#define CANDIDATES 3
#endif
#define REVISIONS 7     /* of etcd: each change of a key takes one, and there are no more */
#define OPERATOR  1     /* how many keys an operator deletes */
#if CANDIDATES == 2
#define LATE 2          /* how many candidates have requests that may be late; of the others only a touch may */
#else
#define LATE 1
#endif

/* ---- Safeguards of the library. Each WITHOUT_... takes one away, and must break a rule. ---- */

/* "An event counts only if its mod revision is larger than the create revision of the awaited key ... The watch of the
   own key follows it as well". */
#ifndef WITHOUT_OLD_EVENT
#define newer_than_awaited(revision) ((revision) > me.awaited)
#else
#define newer_than_awaited(revision) true
#endif
#ifndef WITHOUT_OLD_OWN_EVENT
#define newer_than_own(revision) ((revision) > me.token)
#else
#define newer_than_own(revision) true
#endif

/* "The watch starts from now, and the key is read when the watch exists, so that no deletion is missed in between". */
#if defined(WITHOUT_LOOK)
#define look_finds(change) false
#elif defined(WITHOUT_SECOND_WATCH_FIRST)
#define look_finds(change) ((change) && !me.unlooked)
#else
#define look_finds(change) (change)
#endif
#ifndef WITHOUT_OWN_LOOK
#define own_look_finds(change) (change)
#else
#define own_look_finds(change) false
#endif

/* "The read is not needed if the candidate already knows that nobody is before the key that went". */
#ifndef WITHOUT_READ_OF_THE_PLACE
#define event_elects me.oldest
#else
#define event_elects true
#endif

/* "The read of who is before the leader is sent when the second watch exists". */
#ifndef WITHOUT_SECOND_WATCH_FIRST
#define watch_again pass_over()
#else
#define watch_again me.watch = 0; me.unlooked = true
#endif

/* ErrGone: a candidate that reads its place checks that its own key still exists. */
#ifndef WITHOUT_ERR_GONE
#define own_key_is_missing (!exists(_pid))
#else
#define own_key_is_missing false
#endif

/* The guards of "Requests that arrive late". */
#ifndef WITHOUT_JOIN_GUARD
#define join_allowed(c) (key[c].created == 0)
#else
#define join_allowed(c) true
#endif
#ifndef WITHOUT_TOUCH_GUARD
#define touch_allowed(c, revision) (key[c].created == revision)
#else
#define touch_allowed(c, revision) (key[c].created != 0)
#endif
#ifndef WITHOUT_DELETION_GUARD
#define deletion_allowed(c, revision) (key[c].created == revision)
#else
#define deletion_allowed(c, revision) (key[c].created != 0)
#endif
#ifndef WITHOUT_GUARD           /* Leader.Guard */
#define write_allowed(c, revision) (key[c].created == revision)
#else
#define write_allowed(c, revision) true
#endif

/* Key.Drop: "while an attempt to join has no answer, Drop only abandons the key", and "its name is not used again". */
#ifndef WITHOUT_ABANDON
#define drop_abandons me.unanswered
#else
#define drop_abandons false
#endif
#ifndef WITHOUT_UNUSED_NAME
#define name_is_free (!me.abandoned)
#else
#define name_is_free true
#endif
#ifndef WITHOUT_CERTAIN         /* an abandoned key is forgotten once no attempt to join can put it any more */
#define may_forget (me.late != join)
#else
#define may_forget true
#endif

/* ---- Rules. Each is true until it is broken. ---- */

bool exclusion = true;  /* no two candidates lead while both their keys exist */
bool order = true;      /* nobody is elected while an older key exists */
bool tokens = true;     /* who is elected has a larger token than all before, unless its key is gone */
bool eviction = true;   /* nobody is told that its key is gone while it exists */
bool harmless = true;   /* no late request changes the key of a later candidacy */
bool fencing = true;    /* no guarded write has an effect once a later term has begun */
bool liveness = true;   /* who waits for a key that is gone, or has lost its own, is still to learn it */
bool orphans = true;    /* each key has an owner, or somebody who looks for it */
#ifndef JUDGE
#define judge(rule, holds) rule = (holds); assert(rule)
#else                   /* -DJUDGE=RULE: one rule alone */
#define judge(rule, holds) rule = (holds); assert(JUDGE)
#endif

/* Things that happen: with -DREACH=EVENT the model claims that EVENT never does. Spin must refute that. */
#define EVENT_ELECTS            1   /* without a read */
#define READ_ELECTS             2   /* when the key before has gone */
#define TOUCH_SHOWS_THE_OLDEST  3   /* so that the event elects */
#define NAME_LEADS_AGAIN        4   /* a candidate leads whose key existed before */
#define MIDDLE_LEAVES           5   /* the candidate behind it waits for another */
#define EVICTION_IS_HEARD       6   /* a leader learns that its key was deleted */
#define PHANTOM_LEADS           7   /* its key and the one before it were deleted */
#define DELETION_IS_REFUSED     8   /* it was late: the name is in use again */
#define JOIN_MAKES_AN_ORPHAN    9   /* it was late */
#define ORPHAN_IS_SWEPT        10
#define KEY_IS_FOUND           11   /* an earlier attempt to join has put it */
#define WRITE_IS_REFUSED       12   /* it was late: another leads */
#ifndef REACH
#define REACH 0
#endif
bool claim = true;
#define reach(event) claim = (REACH != event); assert(claim)

/* ---- State ---- */

typedef Key {
  byte created, modified;       /* revisions; 0: the key does not exist */
  byte events;                  /* how many there were so far */
  byte at[REVISIONS];           /* the revision of each event */
  bool deleted[REVISIONS]       /* otherwise the event is a put */
}

mtype = { joining, waiting, leading, leaving };
mtype = { join, touch, write, deletion };
#define away 0                  /* what life is at first */
#define none 0                  /* what late is at first */

typedef Candidate {
  mtype life;
  byte token;                   /* the create revision of its key; 0: it has none */

  byte before, awaited;         /* the candidate before it, and the create revision of that one's key */
  bool oldest;                  /* it is known that nobody is before the candidate before */
  bool touched;                 /* the candidate before has touched, so the place is to be read ahead */
  bool waited;                  /* it has waited itself, so it has to touch its key when it leads */
  byte watch;                   /* of the key before: the number of the next event, from 1; 0: no watch */
  byte own;                     /* the same for its own key */
#ifdef WITHOUT_SECOND_WATCH_FIRST
  bool unlooked;                /* the next watch begins without a read */
#endif

  mtype late;                   /* a request that is under way, for any time */
  byte revision;                /* the create revision that the late request is about */
  bool unanswered;              /* an attempt to join has no answer */
  bool abandoned                /* nobody owns the key, which may exist now or later: renewals look for it */
}

Key key[CANDIDATES];
Candidate candidate[CANDIDATES];
byte now;                       /* etcd's revision */
byte newest;                    /* the largest token of any leader so far */
byte spared = OPERATOR;         /* how many keys the operator may still delete */
byte i, n, a, b;                /* used within a step, and 0 between steps */

#define me      candidate[_pid]
#define mine    key[_pid]
#define waited_for key[me.before]
#define room    (now < REVISIONS)
#define may_be_late (_pid < LATE && me.late == none)
#define exists(c)  (candidate[c].token != 0 && key[c].created == candidate[c].token)
#define lives(c)   (candidate[c].life == waiting || candidate[c].life == leading)

/* ---- etcd ---- */

inline record(gone) {
  now++;
  mine.at[mine.events] = now; mine.deleted[mine.events] = gone;
  mine.events++
}

/* A put is an event for those who wait to see a touch. The other watches pass over it. */
inline put() {
  record(false);
  mine.modified = now;
  if
  :: mine.created == 0 -> mine.created = now
  :: else
  fi;
  for (i : 0 .. CANDIDATES - 1) {
    if
    :: candidate[i].life == waiting && candidate[i].before == _pid && candidate[i].oldest &&
       candidate[i].watch == mine.events -> candidate[i].watch++
    :: else
    fi
  }
  i = 0;
  if
  :: me.own == mine.events -> me.own++
  :: else
  fi
}

inline delete() {
  record(true);
  mine.created = 0; mine.modified = 0
}

/* ---- A candidate ---- */

inline rest() {
  me.before = 0; me.awaited = 0; me.oldest = false; me.touched = false; me.watch = 0
#ifdef WITHOUT_SECOND_WATCH_FIRST
  ; me.unlooked = false
#endif
}

/* The key has no candidate any more, and no deletion of it is under way. */
inline drop() {
  rest();
  me.life = away; me.token = 0; me.waited = false; me.own = 0;
  if
  :: drop_abandons -> me.abandoned = true
  :: else -> me.unanswered = false
  fi
}

inline leave() {
  rest();
  me.life = leaving; me.waited = false; me.own = 0
}

inline elect() {
  for (i : 0 .. CANDIDATES - 1) {
    if
    :: i != _pid ->
       judge(exclusion, !(candidate[i].life == leading && exists(i) && exists(_pid)));
       judge(order, key[i].created == 0 || key[i].created > me.token)
    :: else
    fi
  }
  i = 0;
  judge(tokens, me.token > newest || !exists(_pid));
  newest = (me.token > newest -> me.token : newest);
  if
  :: !exists(_pid) -> reach(PHANTOM_LEADS)
  :: exists(_pid) && mine.at[0] < me.token -> reach(NAME_LEADS_AGAIN)
  :: else
  fi;
  rest();
  me.life = leading
}

/* Reads the place: a and b are the two newest keys before the own key. */
inline place() {
  rest();
  a = CANDIDATES; b = CANDIDATES;
  for (i : 0 .. CANDIDATES - 1) {
    if
    :: key[i].created == 0 || key[i].created >= me.token
    :: else ->
       if
       :: a == CANDIDATES -> a = i
       :: a != CANDIDATES && key[i].created > key[a].created -> b = a; a = i
       :: else -> b = i
       fi
    fi
  }
  i = 0;
#ifdef WITHOUT_ERR_GONE
  if
  :: !exists(_pid) -> a = b; b = CANDIDATES     /* the newest of the three is taken for the own key */
  :: else
  fi;
#endif
  if
  :: a == CANDIDATES -> elect()
  :: else -> me.life = waiting; me.before = a; me.awaited = key[a].created; me.oldest = (b == CANDIDATES)
  fi;
  a = 0; b = 0
}

/* The answer to a join: the key is there. */
inline joined(revision) {
  me.token = revision;
  place();
  me.waited = (me.life == waiting)
}

/* The awaited key is gone. */
inline proceed() {
  if
  :: event_elects -> reach(EVENT_ELECTS); elect()
  :: else ->
     if
     :: own_key_is_missing -> drop()
     :: else ->
        place();
        if
        :: me.life == leading -> reach(READ_ELECTS)
        :: else -> reach(MIDDLE_LEAVES)
        fi
     fi
  fi
}

/* Passes over the events that say nothing about the awaited key: old ones, and puts if it is already known that nobody
   is before it. */
#define counts(e) (newer_than_awaited(waited_for.at[e]) && (waited_for.deleted[e] || !me.oldest))
inline pass_over() {
  do
  :: me.watch <= waited_for.events && !counts(me.watch - 1) -> me.watch++
  :: else -> break
  od
}
#define counts_as_own(e) (newer_than_own(mine.at[e]) && mine.deleted[e])
inline pass_over_own() {
  do
  :: me.own <= mine.events && !counts_as_own(me.own - 1) -> me.own++
  :: else -> break
  od
}

inline evicted() {
  judge(eviction, !exists(_pid));
  if
  :: me.life == leading -> reach(EVICTION_IS_HEARD)
  :: else
  fi;
  drop()
}

/* "Requests that arrive late": the key is changed by a request that is about the key with this create revision. */
#define judge_late(revision_) judge(harmless, !(lives(_pid) && exists(_pid) && me.token != (revision_)))

active [CANDIDATES] proctype campaigns() {
  byte from;

end:
  do
  /* Campaign. Which candidate campaigns first makes no difference, so they begin in order. */
  :: d_step { me.life == away && name_is_free && room && (_pid == 0 || key[_pid - 1].events > 0) -> me.life = joining }
  :: d_step { me.life == joining && join_allowed(_pid) && room -> put(); joined(now) }
  :: d_step { me.life == joining && !join_allowed(_pid) -> reach(KEY_IS_FOUND); joined(mine.created) }
  :: d_step { me.life == joining && may_be_late -> me.late = join; me.unanswered = true }   /* it is sent again */
  :: d_step { me.life == joining -> drop() }                                                     /* given up */

  /* Wait for the key before. The watch begins now or in the past. Then the key is read. */
  :: atomic { me.life == waiting && me.watch == 0 ->
       if
       :: from = 1
       :: from = waited_for.events + 1
       fi;
       d_step {
         me.watch = from; from = 0;
         pass_over();
         if
         :: look_finds(waited_for.created != me.awaited) -> proceed()
         :: else ->
            me.touched = look_finds(waited_for.modified != waited_for.created && !me.oldest)
         fi } }
  :: d_step { me.life == waiting && me.watch != 0 && me.watch <= waited_for.events ->
       if
       :: waited_for.deleted[me.watch - 1] -> proceed()
       :: else -> me.touched = true; me.watch++; pass_over()
       fi }
  :: d_step { me.life == waiting && me.watch != 0 -> me.watch = 0; me.touched = false }          /* it breaks */

  /* Look ahead: open another watch, without puts, and then read who is before the key before. */
  :: d_step { me.touched ->
       me.touched = false;
       if
       :: waited_for.created != me.awaited -> proceed()
       :: else ->
          for (i : 0 .. CANDIDATES - 1) {
            n = n + (key[i].created != 0 && key[i].created < me.awaited -> 1 : 0)
          };
          i = 0;
          if
          :: n == 0 -> reach(TOUCH_SHOWS_THE_OLDEST); me.oldest = true; watch_again
          :: else
          fi;
          n = 0
       fi }

  /* Each candidate and leader also watches its own key. */
  :: atomic { lives(_pid) && me.own == 0 ->
       if
       :: from = 1
       :: from = mine.events + 1
       fi;
       d_step {
         me.own = from; from = 0;
         pass_over_own();
         if
         :: own_look_finds(!exists(_pid)) -> evicted()
         :: else
         fi } }
  :: d_step { lives(_pid) && me.own != 0 && me.own <= mine.events -> evicted() }
  :: d_step { lives(_pid) && me.own != 0 -> me.own = 0 }                                         /* it breaks */

  /* A leader that has waited touches its key once. Each leader writes under its guard. */
  :: d_step { me.life == leading && me.waited && me.late == none ->
       me.waited = false; me.late = touch; me.revision = me.token }
  :: d_step { me.life == leading && may_be_late -> me.late = write; me.revision = me.token }

  /* Resign, or give up: the key is deleted. The request may be sent again, or given up. */
  :: d_step { lives(_pid) -> leave() }
  :: d_step { me.life == leaving && !deletion_allowed(_pid, me.token) -> drop() }
  :: d_step { me.life == leaving && deletion_allowed(_pid, me.token) && room -> delete(); drop() }
  :: d_step { me.life == leaving && may_be_late -> me.late = deletion; me.revision = me.token }
  :: d_step { me.life == leaving -> drop(); me.abandoned = true }

  /* Renewals look for an abandoned key, and delete it. */
  :: d_step { me.abandoned && mine.created != 0 && room ->
       reach(ORPHAN_IS_SWEPT); judge_late(0); delete() }
  :: d_step { me.abandoned && mine.created != 0 && may_be_late -> me.late = deletion; me.revision = mine.created }
  :: d_step { me.abandoned && mine.created == 0 && may_forget -> me.abandoned = false; me.unanswered = false }

  /* A late request is carried out or refused. */
  :: d_step { me.late == join && join_allowed(_pid) && room ->
       judge_late(0);
       if
       :: me.life == away -> reach(JOIN_MAKES_AN_ORPHAN)
       :: else
       fi;
       put(); me.late = none }
  :: d_step { me.late == join && !join_allowed(_pid) -> me.late = none }
  :: d_step { me.late == touch && touch_allowed(_pid, me.revision) && room ->
       judge_late(me.revision); put(); me.late = none; me.revision = 0 }
  :: d_step { me.late == touch && !touch_allowed(_pid, me.revision) -> me.late = none; me.revision = 0 }
  :: d_step { me.late == deletion && deletion_allowed(_pid, me.revision) && room ->
       judge_late(me.revision); delete(); me.late = none; me.revision = 0 }
  :: d_step { me.late == deletion && !deletion_allowed(_pid, me.revision) ->
       if
       :: mine.created != 0 -> reach(DELETION_IS_REFUSED)
       :: else
       fi;
       me.late = none; me.revision = 0 }
  :: d_step { me.late == write && write_allowed(_pid, me.revision) ->
       judge(fencing, me.revision >= newest); me.late = none; me.revision = 0 }
  :: d_step { me.late == write && !write_allowed(_pid, me.revision) ->
       if
       :: me.revision < newest -> reach(WRITE_IS_REFUSED)
       :: else
       fi;
       me.late = none; me.revision = 0 }

  /* An operator deletes the key. */
  :: d_step { spared > 0 && mine.created != 0 && room -> spared--; delete() }
  od
}

/* "No waiting candidate is forgotten": in each state, something is still to be done about each candidate and each key.
   A candidate that waits for a key that exists waits for an older key. So whoever has the oldest key leads or has
   something left to do, or renewals delete the key. */
#define waits_in_vain(c) \
  (candidate[c].life == waiting && key[candidate[c].before].created != candidate[c].awaited && \
   candidate[c].watch > key[candidate[c].before].events && !candidate[c].touched)
#define lives_in_vain(c) (lives(c) && candidate[c].own > key[c].events && !exists(c))
#define is_orphan(c) (candidate[c].life == away && !candidate[c].abandoned && key[c].created != 0)

active proctype looks_on() {
end:
  do
  :: d_step {
       for (i : 0 .. CANDIDATES - 1) {
         judge(liveness, !waits_in_vain(i) && !lives_in_vain(i));
         judge(orphans, !is_orphan(i))
       };
       i = 0 }
  od
}
