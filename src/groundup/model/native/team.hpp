// Threads that share out the pieces of one loop after another.
//
// A region runs the same function in every thread. In it, `Crew::each` gives the pieces of a loop
// to whichever thread comes for them and returns when all are done. Whoever finishes the last piece
// opens the next loop, so a thread that the system has put aside holds nobody up unless it took a
// piece along, and finds the loops that it missed closed. Two loops in a row cost a fraction of a
// microsecond, where a barrier of OpenMP may put threads to sleep. All work lies within loops.

#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

struct Team {
    alignas(64) std::atomic<uint64_t> ticket{0};  // number of the open loop << 32 | its next piece
    alignas(64) std::atomic<uint32_t> done{0};    // pieces of it that are finished
    int threads;
};

class Crew {
    Team& team;
    uint64_t loop = 0;

    static void pause(int turn) {
        if (turn > 2000) return std::this_thread::yield();  // for long: cores are short
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

public:
    explicit Crew(Team& team) : team(team) {}

    // Do f(piece) for all pieces.
    template <class Work>
    void each(long pieces, Work f) {
        if (team.threads == 1 || pieces == 0) {
            for (long i = 0; i < pieces; i++) f(i);
            return;
        }
        uint64_t seen = team.ticket.load(std::memory_order_acquire);
        while (seen >> 32 == loop && uint32_t(seen) < pieces) {
            if (!team.ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            f(long(uint32_t(seen)));
            if (team.done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
                team.done.store(0, std::memory_order_relaxed);
                team.ticket.store((loop + 1) << 32, std::memory_order_release);
            }
            seen = team.ticket.load(std::memory_order_acquire);
        }
        for (int turn = 0; team.ticket.load(std::memory_order_acquire) >> 32 == loop; turn++) pause(turn);
        loop++;
    }

    // Do f(first, last) for parts of 0 .. count, some for every thread.
    template <class Work>
    void spans(long count, Work f) {
        long pieces = std::min(count, team.threads == 1 ? 1L : 4L * team.threads);
        each(pieces, [&](long i) { f(count * i / pieces, count * (i + 1) / pieces); });
    }
};

// Run f(crew) in so many threads; torch's own, where it uses the same OpenMP.
template <class Work>
void run_team(int threads, Work f) {
    Team team;
    team.threads = threads;
#pragma omp parallel num_threads(threads)
    {
        Crew crew(team);
        f(crew);
    }
}
